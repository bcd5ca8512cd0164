import runpy
import sys
from pathlib import Path

import pytest

from pipeline import cli

JOBS = sorted(p.stem for p in (Path(__file__).parents[1] / "jobs").glob("*.py") if p.stem[0] != "_")


def test_there_is_one_for_every_stage_and_for_all():
    assert set(JOBS) == cli.KINDS.keys() - {"run"} | {"all"}


@pytest.mark.parametrize("job", JOBS)
def test_each_runs_its_stage_and_ends_with_its_code(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    assert ended.value.code == 0
    section = "embed" if job == "all" else job
    assert f"  {section}." in capsys.readouterr().out
