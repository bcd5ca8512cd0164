"""The folder for clip-retrieval, by its documented layout and, where it is installed, by itself.

PYTHON_WITH_CLIP_RETRIEVAL names one that has it: it wants pandas < 3, so ours cannot have it too.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.explore.export import clip_retrieval as export_clip_retrieval
from pipeline.store import tables
from tests import fake_run, labelled_run

PEER = os.environ.get("PYTHON_WITH_CLIP_RETRIEVAL")
SEARCH = Path(__file__).with_name("clip_retrieval_search.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("clip-retrieval")
    paths = labelled_run.build(root)
    export_clip_retrieval.run(paths, str(root / "out"))
    return paths, root / "out"


def test_rows_of_both_folders_are_the_same_samples(made):
    paths, out = made
    expected = {row["sample_id"]: row for row in labelled_run.rows(paths)}
    seen = set()
    for i, stem in enumerate(fake_run.STEMS):
        matrix = np.load(out / f"img_emb/img_emb_{i}.npy", allow_pickle=False)
        frame = pd.read_parquet(out / f"metadata/metadata_{i}.parquet")
        part = tables.read(paths.embeddings.file(f"{stem}.parquet"))
        vectors = dict(
            zip(part["sample_id"].to_pylist(), tables.to_matrix(part["embedding"]), strict=True)
        )
        assert matrix.dtype == np.float16 and matrix.shape == (len(frame), fake_run.DIM)
        for vector, row in zip(matrix, frame.to_dict("records"), strict=True):
            label = expected[row["sample_id"]]
            assert np.array_equal(vector, vectors[row["sample_id"]])
            assert row["image_path"] == label["key"]
            for name in ("caption", "url", "cluster_id", "cluster_caption", "confidence", "odd"):
                assert row[name] == label[name]
            seen.add(row["sample_id"])
    assert seen == expected.keys()


def test_a_part_without_rows_has_neither_file(tmp_path):
    """Readers leave out an empty .npy but not its metadata, and would pair the wrong ones."""
    paths = labelled_run.build(tmp_path)
    for folder in (paths.labels, paths.embeddings):
        url = folder.file("00000.parquet")
        tables.write(url, tables.read(url).slice(0, 0))
    export_clip_retrieval.run(paths, str(tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out/img_emb").iterdir()] == ["img_emb_1.npy"]
    assert [p.name for p in (tmp_path / "out/metadata").iterdir()] == ["metadata_1.parquet"]


@pytest.mark.parametrize("parts", [1, 10, 11, 101])
def test_numbers_sort_as_text_in_the_order_of_the_parts(parts):
    names = [export_clip_retrieval.number(i, parts) for i in range(parts)]
    assert names == sorted(set(names)) and len(names) == parts


def test_embeddings_of_other_samples_are_seen(tmp_path):
    paths = labelled_run.build(tmp_path)
    url = paths.embeddings.file("00001.parquet")
    table = tables.read(url)
    tables.write(url, table.take(pa.array(range(len(table) - 1, -1, -1))))
    with pytest.raises(RuntimeError, match="00001: embeddings and labels hold different samples"):
        export_clip_retrieval.run(paths, str(tmp_path / "out"))


def test_what_write_left_out_has_no_embedding(tmp_path):
    paths = labelled_run.build(tmp_path)
    url = paths.labels.file("00000.parquet")
    table = tables.read(url)
    status = ["excluded", *table["status"].to_pylist()[1:]]
    place = table.schema.get_field_index("status")
    tables.write(url, table.set_column(place, "status", pa.array(status)), **tables.facts(url))
    export_clip_retrieval.run(paths, str(tmp_path / "out"))
    frame = pd.read_parquet(tmp_path / "out/metadata/metadata_0.parquet")
    assert (
        len(np.load(tmp_path / "out/img_emb/img_emb_0.npy", allow_pickle=False))
        == len(frame)
        == table.num_rows - 1
    )
    assert table["sample_id"][0].as_py() not in set(frame["sample_id"])


@pytest.mark.skipif(not PEER, reason="PYTHON_WITH_CLIP_RETRIEVAL names no Python")
def test_clip_retrieval_indexes_and_answers(made, tmp_path):
    """Its `index` (autofaiss), its reader, and the metadata and search of its back end."""
    paths, out = made
    done = subprocess.run(
        [str(PEER), str(SEARCH), str(out), str(tmp_path / "index")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    labels = {row["sample_id"]: row for row in labelled_run.rows(paths)}
    assert len(answers) == len(labels)
    for asked, found in answers.items():
        assert found["sample_id"] == asked  # its own vector is the nearest
        assert found["cluster_id"] == labels[asked]["cluster_id"]
        assert found["url"] == labels[asked]["url"]
