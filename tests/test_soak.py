"""A minute of random faults leaves every loss as it is."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_is_disturbed_for_a_while_is_the_undisturbed_one() -> None:
    command = [sys.executable, "-m", "benchmarks.soak", "minutes=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("steps with the same losses, bit for bit\n")
