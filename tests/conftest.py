"""Settings of the processes that run tests, made before jax is imported; timeouts with stacks."""

import faulthandler
import gc
import os
import re
import sys
import zlib

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
# Most of the time goes into compilation, half of it into optimisations that few tests need; those
# ask for them (see contract.py).
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)

# XLA starts as many threads as there are cores, in every pytest-xdist worker. NPROC tells it how
# many it may take; two at least, because some defects (deadlocks) need two threads to be seen.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("NPROC", str(max(2, (os.cpu_count() or 1) // _workers)))

_stderr = pytest.StashKey[int]()
MAPPINGS = 20_000  # Linux allows a process 65,530


@pytest.fixture(autouse=True)
def few_mappings():
    """Compiled programs take memory mappings; a process that runs out of them dies in LLVM."""
    yield
    if "jax" in sys.modules and os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps", "rb") as maps:
            count = sum(1 for _ in maps)
        if count > MAPPINGS:
            sys.modules["jax"].clear_caches()
            gc.collect()


@pytest.fixture
def exact_products():
    """Layers' float32 products are exact to float32. Without it a GPU rounds their factors to TF32,
    about 5e-4; the products of cells name their precision and need nothing."""
    with sys.modules["jax"].default_matmul_precision("highest"):
        yield


def pytest_addoption(parser):
    parser.addoption("--share", default="0/1", help="i/n: one n-th of the tests, 0/n to (n-1)/n")


def pytest_collection_modifyitems(config, items):
    """Puts tests of one cell or model side by side, where the module names the parameter that says
    which: they share compiled code, and pytest-xdist gives neighbours to one worker. They are in
    the same share too."""
    share = re.fullmatch(r"(\d+)/(\d+)", config.getoption("share"))
    if not share or int(share[1]) >= int(share[2]):
        raise pytest.UsageError(f"--share must be i/n, i < n; given {config.getoption('share')}")
    modules = {item.module.__name__: number for number, item in enumerate(items)}

    def group(item):
        name = getattr(item.module, "GROUPED_BY", None)
        value = getattr(item, "callspec", None) and item.callspec.params.get(name)
        return getattr(value, "name", value) or ""

    def mine(item):
        name = f"{item.module.__name__} {group(item) or item.name}"
        return zlib.crc32(name.encode()) % int(share[2]) == int(share[1])

    config.hook.pytest_deselected(items=[item for item in items if not mine(item)])
    items[:] = sorted(filter(mine, items), key=lambda i: (modules[i.module.__name__], group(i)))


def pytest_configure(config):
    """Keeps the error stream of the process; during the tests pytest captures what goes to it."""
    config.stash[_stderr] = os.dup(2)


# pytest-timeout says when, faulthandler does it: its timer fires also while C++ code holds the
# interpreter, and its report reaches the terminal from a pytest-xdist worker too.
@pytest.hookimpl(optionalhook=True)
def pytest_timeout_set_timer(item, settings):
    """Starts the timer of a test: print the stacks of all threads, end the process."""
    stream = item.config.stash[_stderr]
    faulthandler.dump_traceback_later(settings.timeout, exit=True, file=stream)
    return True


@pytest.hookimpl(optionalhook=True)
def pytest_timeout_cancel_timer(item):
    """Stops the timer of a test that ended."""
    faulthandler.cancel_dump_traceback_later()
    return True
