"""What must be seen in a process of its own: it is run with a time limit, so that a hang fails."""

import os
import signal
import subprocess
import sys

import pytest

HERE = os.path.dirname(__file__)


def run_child(program: str, *arguments: str, timeout: float = 120) -> str:
    """Return what Python code printed in a new process that finds the tests' modules; none may outlive it."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {HERE!r})\n{program}", *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as child:
        try:
            printed, _ = child.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail(f"no end after {timeout} seconds; printed: {child.communicate()[0]}")
    assert child.returncode == 0, printed
    return printed
