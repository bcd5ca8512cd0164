"""Six faults, two of each of three kinds; `make chaos` does a hundred of all kinds."""

import subprocess
import sys

import pytest

from tests.chaos.real_run import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_six_faults_lose_nothing(tmp_path):
    command = [
        sys.executable,
        "-m",
        "tests.chaos",
        "--faults",
        "6",
        "--of-a-run",
        "2",
        "--seed",
        "7",
    ]
    only = ["--only", "processes", "cluster", "storage", "--folder", str(tmp_path)]
    done = subprocess.run([*command, *only], cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "samples lost 0, duplicated 0; files differing 0" in done.stdout
