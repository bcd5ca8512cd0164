"""A second encoder for a finished run of all stages, by the command line."""

import json
import shutil

import pytest

from pipeline import open_run
from pipeline.cli import main as cli
from tests.conftest import TINY, run_arguments

pytestmark = [pytest.mark.slow, pytest.mark.ray]


def test_a_second_encoder_is_added_to_a_finished_run(
    finished_run, tiny_shards, tmp_path, capfd, caplog
):
    root = shutil.copytree(finished_run, tmp_path / "run")
    command = [*run_arguments(tiny_shards, root), "--set", 'embed.also=["pico-resnet"]']
    with caplog.at_level("INFO"):
        assert cli.invoke(command) == 0
    assert "2 parts keep their columns" in caplog.text
    assert cli.invoke(["verify", "--root", str(root)]) == 0
    capfd.readouterr()
    caplog.clear()
    with caplog.at_level("INFO"):
        assert cli.invoke([*command, "--json"]) == 0
    assert caplog.text.count("already done") == 7
    assert json.loads(capfd.readouterr().out)["embedded"] == 2 * TINY
    table = open_run(root).embeddings().to_table(columns=["embedding", "embedding_2"])
    assert table.num_rows == 2 * TINY and not any(column.null_count for column in table.columns)
    assert cli.invoke(run_arguments(tiny_shards, root)) == 2  # without the second encoder
    assert "embed.also was ['pico-resnet'], is []" in capfd.readouterr().err
