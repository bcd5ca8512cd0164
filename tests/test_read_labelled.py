"""examples/read_labelled.py, run on the labelled shards of a finished run."""

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "read_labelled.py"


@pytest.mark.ray
def test_it_prints_the_labels(finished_run):
    done = subprocess.run(
        [sys.executable, SCRIPT, f"{finished_run}/labeled", "--samples", "1000"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    labels = [
        row
        for path in sorted(Path(finished_run, "labels").glob("*.parquet"))
        for row in pq.read_table(path).to_pylist()
    ]
    assert len(lines) == len(labels) == 123
    for line, row in zip(lines, labels, strict=True):
        end = row["error_message"] or f"{row['confidence']:.2f}"
        assert line.startswith(row["key"]) and line.endswith(end)
