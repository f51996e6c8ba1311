"""Triton decides at its import whether it interprets: without a GPU its kernels' tests run in their own process."""

import os
import subprocess
import sys


def run_interpreted(file: str, timeout: float) -> None:
    """Run a file's tests with Triton's interpreter; they must pass, and there must be some."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    print(result.stdout)
    assert result.returncode == 0, result.stdout
    assert " passed" in result.stdout
