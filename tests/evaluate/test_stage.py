"""Evaluation: all labelled samples, joined by name, next to k-means; errors say what to do."""

import json
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.evaluate import score_tables
from pipeline.evaluate import settings as evaluate_settings
from pipeline.evaluate import stage as evaluate
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from tests import fake_run


@pytest.fixture
def paths(tmp_path):
    return fake_run.build(tmp_path)


def test_scores_all_labelled_samples_and_the_baseline(paths):
    result = evaluate.run(evaluate_settings.Config(), paths)
    counted = [result[key] for key in ("label", "samples", "unlabelled", "classes", "k")]
    assert counted == ["label", 29, 1, 3, 3]
    named = [(row["name"], row["k"]) for row in result["rows"]]
    assert named == [("ratecluster", 3), ("k-means", 3), ("k-means, centred features", 3)]
    assert result["rows"][0]["acc"] == pytest.approx(28 / 29, abs=1e-6)
    assert [row["acc"] for row in result["rows"][1:]] == [1, 1]
    assert result["baseline"] == "KMeans, best of 10"


def test_clusters_have_their_majority_and_caption(paths):
    red, green, blue = evaluate.run(evaluate_settings.Config(baseline=False), paths)["clusters"]
    assert (red["majority"], red["share"], red["size"]) == ("red", 1, 9)
    assert (green["majority"], green["caption"]) == ("green", "green & <b>leafy</b>")
    assert (blue["majority"], blue["share"]) == ("blue", pytest.approx(10 / 11, abs=1e-6))


def test_file_is_the_result_with_sorted_keys(paths):
    result = evaluate.run(evaluate_settings.Config(), paths)
    text = Path(paths.evaluation_json).read_text()
    assert json.loads(text) == result
    assert text == json.dumps(result, indent=1, sort_keys=True)


def test_true_number_of_classes_is_a_baseline_too(paths):
    fake_run.refinish(paths.clusters, sizes=[9, 10, 11, 0])
    result = evaluate.run(evaluate_settings.Config(), paths)
    assert [row["k"] for row in result["rows"]] == [4, 4, 4, 3, 3]
    assert result["clusters"][3]["majority"] is None


def test_runs_without_captions_and_again_with_them(tmp_path):
    paths = fake_run.build(tmp_path, captions=False)
    first = evaluate.run(evaluate_settings.Config(), paths)
    assert first["clusters"][0]["caption"] is None
    fake_run._captions(paths)
    assert (
        evaluate.run(evaluate_settings.Config(), paths)["clusters"][0]["caption"] == fake_run.SCRIPT
    )


def test_done_is_done_until_something_changes(paths, caplog):
    caplog.set_level(logging.INFO, "pipeline")
    first = evaluate.run(evaluate_settings.Config(), paths)
    assert evaluate.run(evaluate_settings.Config(), paths) == first
    assert "already done" in caplog.messages[-1]
    assert (
        evaluate.run(evaluate_settings.Config(baseline=False), paths)["fingerprint"]
        != first["fingerprint"]
    )
    fake_run.refinish(paths.clusters, fingerprint="clusters-2")
    assert (
        evaluate.run(evaluate_settings.Config(baseline=False), paths)["clustering"] == "clusters-2"
    )


def test_many_samples_go_by_mini_batches(paths, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_KMEANS", 10)
    result = evaluate.run(evaluate_settings.Config(), paths)
    assert result["baseline"] == "MiniBatchKMeans, best of 10"
    assert result["rows"][1]["name"] == "mini-batch k-means"


@pytest.mark.parametrize("field", ["label_of_nothing", "odd"])
def test_a_field_without_classes_names_the_fields(paths, field):
    with pytest.raises(UserError, match="'label', 'odd', 'url'"):
        evaluate.run(evaluate_settings.Config(label=field), paths)


def test_classes_of_cls_files(paths):
    expected = evaluate.run(evaluate_settings.Config(), paths)
    for stem in (facts["shard"]["stem"] for facts in paths.embeddings.manifest()["shards"]):
        url = paths.embeddings.file(f"{stem}.parquet")
        part = tables.read(url)
        own = [evaluate.label(text, "label") for text in part["json"].to_pylist()]
        place = part.schema.get_field_index("cls")
        tables.write(url, part.set_column(place, "cls", pa.array(own, pa.string())))
    fake_run.refinish(paths.embeddings, classes=29)
    found = evaluate.run(evaluate_settings.Config(label="cls"), paths)
    assert (found["label"], found["samples"], found["rows"]) == ("cls", 29, expected["rows"])
    columns = paths.embeddings.manifest()["columns"]
    fake_run.refinish(paths.embeddings, columns={n: k for n, k in columns.items() if n != "label"})
    assert evaluate.run(evaluate_settings.Config(), paths)["label"] == "cls"


def test_unassigned_run_is_refused(paths):
    paths.clusters.clear()
    with pytest.raises(UserError, match="run `ratecluster select-k` first"):
        evaluate.run(evaluate_settings.Config(), paths)


def test_parts_of_different_samples_are_refused(paths):
    url = paths.assignments.file("00001.parquet")
    table = tables.read(url)
    tables.write(url, table.take(np.arange(table.num_rows)[::-1]))
    with pytest.raises(RuntimeError, match="00001: embeddings and assignments"):
        evaluate.run(evaluate_settings.Config(), paths)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"c": "a"}', "a"),
        ('{"c": 3}', "3"),
        ('{"c": 3.0}', "3"),
        ('{"c": 2.5}', "2.5"),
        ('{"c": true}', "True"),
        ('{"c": NaN}', None),
        ('{"c": null}', None),
        ('{"c": ["a", "b"]}', "a"),
        ('{"c": []}', None),
        ('{"c": {"a": 1}}', None),
        ("{}", None),
        (None, None),
    ],
)
def test_what_is_a_class(text, expected):
    assert evaluate.label(text, "c") == expected


def test_table_is_aligned():
    rows = [
        {"name": "ratecluster", "k": 1000, "acc": 1.0, "nmi": 0.1234, "ari": -0.001},
        {"name": "k-means, centred features", "k": 7, "acc": 0.5, "nmi": 0.5, "ari": 0.5},
    ]
    lines = score_tables.text({"rows": rows}).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["ratecluster", "1000", "100.0", "12.3", "-0.1"]


@pytest.mark.parametrize("asked", [False, True])
def test_no_more_embeddings_are_held_than_are_asked_for(paths, asked):
    part = evaluate.read_part("00001", "label", asked, paths)
    table = tables.read(paths.embeddings.file("00001.parquet"))
    expected = tables.to_matrix(table["embedding"]).astype(np.float32)
    assert len(part.truth) == 15
    assert np.array_equal(part.embeddings, expected if asked else np.zeros((15, 0), np.float32))
