"""A test that hangs is ended, named, and the stacks of its threads are printed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HANGS = """
import time
import pytest

@pytest.mark.timeout(2)
def test_that_hangs():
    time.sleep(120)

def test_that_passes():
    pass
"""


@pytest.mark.slow
def test_stacks_reach_the_terminal_from_a_worker(tmp_path):
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_hangs.py").write_text(HANGS, encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Timeout" in done.stderr and "in test_that_hangs" in done.stderr
    assert "1 failed, 1 passed" in done.stdout
    assert "crashed while running 'test_hangs.py::test_that_hangs'" in done.stdout
