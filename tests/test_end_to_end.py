"""All stages on two tiny shards of real images, by the command line."""

import io
import json
import tarfile

import pyarrow.compute as pc
import pytest

from pipeline.artifacts import layout
from pipeline.cli import main as cli
from pipeline.store import tables
from tests.conftest import TINY, run_arguments

pytestmark = pytest.mark.ray
STEMS = ("00000", "00001")


def files(root) -> dict[str, bytes]:
    """Every file of a run but those that hold times."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.suffix in (".parquet", ".tar", ".safetensors") and path.name != "history.parquet"
    }


def test_every_sample_of_the_tars_is_a_label(finished_run, tiny_shards):
    paths = layout.RunPaths(str(finished_run))
    manifest = paths.embeddings.manifest()
    assert (manifest["samples"], manifest["embedded"], manifest["rejected"]) == (
        2 * TINY + 3,
        2 * TINY,
        3,
    )
    for stem in STEMS:
        labels = tables.read(paths.labels.file(f"{stem}.parquet"))
        with tarfile.open(tiny_shards / f"{stem}.tar") as tar:
            keys = list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))
        assert labels["key"].to_pylist() == keys
        assert labels["sample_id"].to_pylist() == [f"{stem}/{key}" for key in keys]
        good = labels.filter(pc.equal(labels["status"], "success"))
        assert good.num_rows == TINY
        assert good["cluster_id"].null_count == 0 and good["cluster_caption"].null_count == 0


def test_labels_have_one_schema_and_the_columns_of_the_json(finished_run):
    paths = layout.RunPaths(str(finished_run))
    first, second = (tables.read(paths.labels.file(f"{stem}.parquet")) for stem in STEMS)
    assert first.schema.equals(second.schema, check_metadata=False)
    assert {"label", "sublabel", "unified", "width", "sha256", "extra"} <= set(first.column_names)
    rejected = second.filter(pc.equal(second["status"], "rejected")).to_pylist()
    assert {row["key"] for row in rejected} == {"bad-cut", "bad-text", "bad-none"}
    assert all(row["error_message"] and row["cluster_id"] is None for row in rejected)
    assert json.loads(rejected[0]["extra"]) == [1, 2]


def test_clusters_are_as_many_as_given_and_hold_every_sample(finished_run):
    paths = layout.RunPaths(str(finished_run))
    clusters = tables.read(paths.clusters_table)
    assert clusters.num_rows == 4
    sizes = clusters["size"].to_pylist()
    assert sum(sizes) == 2 * TINY and sizes == sorted(sizes, reverse=True)
    counted = [0] * 4
    for stem in STEMS:
        for row in tables.read(paths.assignments.file(f"{stem}.parquet")).to_pylist():
            counted[row["cluster_id"]] += 1
            assert row["top_clusters"][0] == row["cluster_id"]
            assert row["confidence"] == pytest.approx(row["top_shares"][0])
    assert counted == sizes


def test_labelled_shards_differ_from_the_input_by_one_json_key(finished_run, tiny_shards):
    for stem in STEMS:
        before = members(tiny_shards / f"{stem}.tar")
        after = members(finished_run / "labeled" / f"{stem}.tar")
        for name, data in before.items():
            if not name.endswith(".json"):
                assert after[name] == data
            else:
                found = json.loads(after[name])
                assert found.pop("ratecluster")["status"] in ("success", "rejected")
                assert found == json.loads(data)
        added = {name for name in after if name not in before}
        assert added == ({"bad-text.json", "bad-none.json"} if stem == "00001" else set())


def members(path) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_report_and_facts_are_there(finished_run):
    page = (finished_run / "report" / "index.html").read_text()
    assert page.count("<script") == 4 and ">00001/bad-text<" in page
    facts = json.loads((finished_run / "run.json").read_text())
    assert facts["stages"]["embed"]["samples"] == 2 * TINY + 3
    assert facts["versions"]["ratecluster"]
    assert json.loads((finished_run / "evaluation.json").read_text())["samples"] == 2 * TINY


def test_again_does_nothing_and_elsewhere_gives_the_same_bytes(
    finished_run, tiny_shards, tmp_path, caplog, capfd
):
    before = files(finished_run)
    with caplog.at_level("INFO"):
        assert cli.invoke([*run_arguments(tiny_shards, finished_run), "--json"]) == 0
    assert caplog.text.count("already done") == 7
    assert files(finished_run) == before
    message = json.loads(capfd.readouterr().out)
    assert (message["samples"], message["embedded"], message["rejected"]) == (
        2 * TINY + 3,
        2 * TINY,
        3,
    )
    assert message["k"] == 4 == len(message["clusters"])
    assert sum(cluster["size"] for cluster in message["clusters"]) == 2 * TINY
    assert message["evaluation"][0]["name"] == "ratecluster"
    assert message["report"] == str(finished_run / "report" / "index.html")
    assert cli.invoke(run_arguments(tiny_shards, tmp_path)) == 0
    assert files(tmp_path) == before
