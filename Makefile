# Each target makes its own virtual environment first; that takes under a second when it is there.
.DEFAULT_GOAL := help
.PHONY: help quickstart sweep-demo test test-all test-fast test-slow test-kernels test-gpu \
        test-tpu test-optional test-skypilot test-floor lint docs benchmark constraints environment clean

PYTHON := .venv/bin/python
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
WORKERS ?= $(shell test $(CORES) -gt 4 && echo 4 || echo $(CORES))
PYTEST = -m pytest -n $(WORKERS) --dist worksteal --durations 15 $(ARGS)
CPU = JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu}

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

quickstart: environment ## train a small hybrid model on the standard library's sources
	$(PYTHON) -m memjax.train --config=configs/quickstart.py --workdir=runs/quickstart $(ARGS)

# Rows, table and picture come to runs/sweep_demo; without that folder it begins anew.
sweep-demo: environment ## 12 trials of cells and learning rates through Ray and Optuna, in runs/sweep_demo
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[sweeps]'
	mkdir -p runs/sweep_demo
	cp experiments/learning_rate/sweep.py experiments/learning_rate/README.md runs/sweep_demo/
	$(CPU) $(PYTHON) -m memjax.sweep --sweep=runs/sweep_demo/sweep.py --address=local $(ARGS)
	@echo "table:   runs/sweep_demo/README.md"; echo "picture: runs/sweep_demo/sweep_demo.png"

test: lint test-fast ## lint and the fast tests; ARGS="-k name" is passed to pytest

test-all: test test-slow test-kernels test-optional test-skypilot ## everything: the full product of cells, forms and wrappers too

test-fast: environment
	$(CPU) $(PYTHON) $(PYTEST) -m "not slow"

test-slow: environment # pytest says 5 when no test is marked slow
	$(CPU) $(PYTHON) $(PYTEST) -m slow --ignore tests/kernels --ignore tests/test_colabs.py || test $$? -eq 5

# A CUDA plugin in the environment itself would end every run that does not name its platform.
test-kernels: environment ## all tests of pallas_kernels/; it installs what compiles for TPUs and GPUs
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[tpu]'
	test -d .venv/cuda || $(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt \
	    --no-deps --target .venv/cuda jax-cuda13-plugin jax-cuda13-pjrt
	$(CPU) $(PYTHON) $(PYTEST) tests/kernels

# Ends in one line where jax finds no such device. $(call needs,PLATFORM,EXTRA)
needs = JAX_PLATFORMS=$(1) $(PYTHON) -c "import jax; jax.devices()" 2>/dev/null || { echo \
    "$@ finds no $(1) device; jax's plugin for it: $(PYTHON) -m pip install -e '.[$(2)]'"; exit 1; }

test-gpu: environment ## the kernels for GPUs on the H100 or H200 at hand
	@$(call needs,cuda,cuda13)
	JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_PREALLOCATE=false $(PYTHON) $(PYTEST) tests/kernels \
	    -k "gpu and (values_and_gradients or many_blocks or cells_run_them) or cudnn"

test-tpu: environment ## the kernels for TPUs on the TPU at hand
	@$(call needs,tpu,tpu)
	JAX_PLATFORMS=tpu,cpu $(PYTHON) -m pytest $(ARGS) tests/kernels \
	    -k "not gpu and values_and_gradients or splash_attention"

test-optional: environment ## the tests that need optional packages, which it installs
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt \
	    -e '.[tfds,logging,notebooks,sweeps]'
	$(CPU) $(PYTHON) -m pytest -q tests/test_sources.py tests/test_metrics.py tests/test_colabs.py \
	    tests/test_sweep_ray.py

# It wants older versions of common packages than memjax, and has an environment of 0.45 GB for itself.
test-skypilot: environment ## whether SkyPilot takes the YAML of sweeps
	test -x .venv/skypilot/bin/sky || { $(PYTHON) -m venv .venv/skypilot && .venv/skypilot/bin/python -m \
	    pip install -q --disable-pip-version-check skypilot==0.14.1; }
	$(CPU) $(PYTHON) -m pytest -q tests/test_sweep_parts.py -k skypilot

test-floor: ## the fast tests and the notebooks on the oldest supported versions, with Python 3.11
	@.ci/environment .venv-floor constraints-floor.txt 3.11
	$(CPU) .venv-floor/bin/python $(PYTEST) -m "not slow"
	.venv-floor/bin/python -m pip install -q --disable-pip-version-check -c constraints-floor.txt \
	    -e '.[notebooks]'
	$(CPU) .venv-floor/bin/python -m pytest -q tests/test_colabs.py

lint: environment ## ruff and mypy
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy

docs: environment ## the documentation site, in build/docs; no link may be broken
	$(PYTHON) -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

benchmark: environment ## speed and peak memory of the cells' forms
	$(PYTHON) -m memjax.benchmark $(ARGS)

constraints: ## look up the newest versions again (needs uv and a network)
	{ echo '# The versions that memjax is tested with. Written by "make constraints".'; \
	  echo jax-cuda13-plugin | uv pip compile -q --universal --python-version 3.11 --no-header \
	    --no-annotate --extra dev --extra docs --extra logging --extra notebooks --extra sweeps \
	    --extra tfds --extra tpu pyproject.toml -; \
	} >constraints.new && mv constraints.new constraints.txt

environment:
	@.ci/environment

clean: ## remove the environments, the site and the caches; runs/ stays
	rm -rf build .venv .venv-floor .venv.lock .venv-floor.lock .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
