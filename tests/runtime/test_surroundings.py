"""Any working folder, home, temporary folder and encoding; a cluster that is dead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.runtime import cluster
from pipeline.runtime.errors import UserError
from tests.conftest import BUNDLED

COMMAND = str(Path(sys.executable).with_name("ratecluster"))


def ratecluster(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {n: v for n, v in os.environ.items() if n not in ("RAY_ADDRESS", "PYTHONPATH")}
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_dead_cluster_is_named_with_the_remedy(monkeypatch, address):
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1: no Ray answers there .* unset RAY_AD"):
        cluster._check_answers(address)


def test_text_that_the_terminal_cannot_show_is_replaced(finished_run, tmp_path):
    for arguments in (["status", "--root", str(finished_run)], ["embed", "--help"]):
        done = ratecluster(*arguments, cwd=tmp_path, PYTHONIOENCODING="ascii", LC_ALL="C")
        assert done.returncode == 0, done.stderr.decode()
        assert b"embed" in done.stdout and b"Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.ray
def test_a_stage_in_odd_surroundings(tmp_path):
    """Modules of our names in the working folder, no home, and a long temporary folder."""
    here = tmp_path / "here"
    (here / "pipeline").mkdir(parents=True)
    for name in ("pipeline/__init__.py", "PIL.py", "ray.py", "torch.py"):
        (here / name).write_text("raise SystemExit('this is not the module you want')")
    long = tmp_path / ("temporary" * 9)
    long.mkdir()
    done = ratecluster(
        *("embed", "--shards", str(BUNDLED / "00000.tar"), "--root", "run"),
        cwd=here,
        HOME="/proc/nowhere",
        TMPDIR=str(long),
        PYTHONIOENCODING="ascii",
        LC_ALL="C",
    )
    assert done.returncode == 0, done.stderr.decode()
    assert (here / "run" / "embeddings" / "00000.parquet").exists()
    assert b"logging.cc" not in done.stderr and b"Traceback" not in done.stderr
