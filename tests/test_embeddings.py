"""`run --embeddings`: all stages on given embeddings, by the command line."""

import json
import re
from collections import Counter
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

import pipeline
from pipeline.cli import main as cli
from pipeline.embed.given import sources
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.store.shards import ShardReader
from pipeline.vision import clip
from tests.conftest import FEW_WORDS, TINY
from tests.given_vectors import NAMES, write_clip_retrieval, write_parquet

pytestmark = pytest.mark.ray
QUICK = ("train.steps=4", "train.batch_size=64", "select_k.k_max=8")
TWO = 'embeddings.columns=["clip", "dino"]'


def arguments(vectors: Path, root: Path, *settings: str) -> list[str]:
    sets = [part for each in (*QUICK, *settings) for part in ("--set", each)]
    return ["run", "--embeddings", str(vectors), "--root", str(root), *sets]


@pytest.fixture(scope="module")
def run(tmp_path_factory, ray_session) -> tuple[Path, Path]:
    """The files and the root of a run of all stages with two views and true classes."""
    folder = tmp_path_factory.mktemp("given")
    vectors = write_parquet(folder / "v")
    assert cli.invoke(arguments(vectors, folder / "run", TWO, "evaluate.label=label")) == 0
    return vectors, folder / "run"


def test_everything_but_pictures_is_there_and_sound(run, capfd):
    _, root = run
    assert cli.invoke(["verify", "--root", str(root)]) == 0
    assert "is sound" in capfd.readouterr().out
    assert not (root / "labeled").exists()
    labels = duckdb.sql(f"SELECT * FROM '{root}/labels/*.parquet' ORDER BY sample_id").pl()
    assert len(labels) == 400 and labels["sample_id"][0] == "00000/0-0000"
    assert set(labels["status"]) == {"success"} and labels["width"].max() == 199
    assert labels["label"].n_unique() == len(NAMES)
    scores = json.loads((root / "evaluation.json").read_text())["rows"][0]
    assert scores["acc"] > 0.99
    named = dict(zip(labels["label"], labels["cluster_caption"], strict=True))
    assert named == {name: name for name in NAMES}  # by the samples' own captions


def test_the_further_column_is_a_further_view(run):
    _, root = run
    trained = json.loads((root / "network" / "manifest.json").read_text())
    assert [view["name"] for view in trained["views"]] == ["images", "dino"]
    made = pipeline.open_run(root).embeddings().to_table(columns=["embedding", "embedding_2"])
    assert [f.type.list_size for f in made.schema] == [32, 16]


def test_the_report_has_texts_and_no_pictures(run):
    page = (run[1] / "report" / "index.html").read_text()
    body = page[: page.index('<script type="application/json"')]
    assert "4 clusters in 400 samples" in body and "in 2 files" in body
    assert "given embeddings: clip, dino" in body and "a photo of a red fox" in body
    assert "<img" not in body and "no longer readable" not in body


def test_a_finished_run_does_nothing_and_status_says_so(run, capfd, caplog):
    vectors, root = run
    command = arguments(vectors, root, TWO, "evaluate.label=label")
    with caplog.at_level("INFO"):
        assert cli.invoke([*command, "--json"]) == 0
    assert caplog.text.count("already done") == 7
    facts = json.loads(capfd.readouterr().out)
    assert (facts["embedded"], facts["shards"], facts["given"]) == (400, 2, True)
    for more in ([], ["--embeddings", str(vectors), *command[5:]]):
        assert cli.invoke(["status", "--root", str(root), "--json", *more]) == 0
        stages = json.loads(capfd.readouterr().out)["stages"]
        assert {stage["rerun"] for stage in stages} == {"nothing"} and len(stages) == 7


def test_search_by_a_sample_of_the_run(run, tmp_path, capfd):
    root, page = run[1], tmp_path / "found.html"
    for space in ("clip", "z"):
        assert cli.invoke(["index", "--root", str(root), "--space", space]) == 0
        capfd.readouterr()
        command = ["search", "--root", str(root), "--space", space, "--sample", "00001/1-0007"]
        assert cli.invoke([*command, "--html", str(page), "--json"]) == 0
        hits = json.loads(capfd.readouterr().out)["hits"]
        assert hits[0]["sample_id"] == "00001/1-0007" and hits[0]["score"] > 0.99
        assert len({hit["cluster_id"] for hit in hits}) == 1 and hits[0]["tar_offset"] is None
        assert "<img" not in page.read_text() and "no longer" not in page.read_text()


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (["search", "--text", "dog"], "given without a model.*--sample"),
        (["search", "--sample", "00000/none"], "no embedding of the sample '00000/none'"),
        (["search"], "give either --image, --text or --sample"),
        (["export", "coco", "--out", "OUT.json"], "export coco needs pictures"),
        (["export", "fiftyone", "--out", "OUT"], "export fiftyone needs pictures"),
        (["caption", "--set", "caption.vocabulary=pico-clip"], "set embeddings.model"),
        (["run", "--shards", "SHARDS"], "made with different settings .with --embeddings."),
    ],
)
def test_what_such_a_run_refuses(run, tiny_shards, tmp_path, capfd, command, why):
    command = [
        w.replace("OUT", f"{tmp_path}/x").replace("SHARDS", str(tiny_shards)) for w in command
    ]
    if "search" in command:
        assert cli.invoke(["index", "--root", str(run[1])]) == 0
    assert cli.invoke([*command, "--root", str(run[1])]) == 2
    assert re.search(why, capfd.readouterr().err)


def test_the_api(run, tmp_path):
    vectors, root = run
    opened = pipeline.open_run(root)
    with pytest.raises(UserError, match="no picture: the run was made of embeddings alone"):
        opened.image("00000/0-0000")
    settings = {"train": {"steps": 4, "batch_size": 64}, "select_k": {"k_max": 8}}
    settings |= {"evaluate": {"label": "label"}}
    given = {"url": str(vectors), "columns": ["clip", "dino"]}
    again = pipeline.run(None, root, embeddings=given, **settings)
    assert again.clusters().num_rows == 4
    with pytest.raises(UserError, match="several columns of vectors: clip, dino"):
        pipeline.run(None, tmp_path / "run", embeddings=vectors)


def test_clip_retrieval_without_captions_names_clusters_by_number(tmp_path, ray_session, capfd):
    """With bad rows among them."""
    folder = write_clip_retrieval(tmp_path / "v", n=60, dtype="<f4")
    x = np.load(folder / "img_emb" / "img_emb_1.npy")
    x[3], x[4] = np.nan, 0
    np.save(folder / "img_emb" / "img_emb_1.npy", x)
    for path in (folder / "metadata").iterdir():
        keys = pq.read_table(path)["image_path"].to_pylist()
        pq.write_table(pa.table({"image_path": [*keys[:-2], None, keys[0]]}), path)
    root = tmp_path / "run"
    assert cli.invoke(arguments(folder, root)) == 0
    message = capfd.readouterr().out
    assert "120 samples in 2 files: 114 labelled, 6 rejected" in message and "cluster 3" in message
    assert cli.invoke(["verify", "--root", str(root)]) == 0
    captions = pipeline.open_run(root).clusters()["cluster_caption"].to_pylist()
    assert captions == [f"cluster {i}" for i in range(4)]
    why = Counter(pipeline.open_run(root).labels().to_table()["error_message"].to_pylist())
    del why[None]
    bad = {"embedding_not_finite: img_emb": 1, "zero_vector: img_emb": 1}
    assert why == bad | {"missing_id": 2, "duplicate_key": 2}
    page = (root / "report" / "index.html").read_text()
    assert "duplicate_key" in page and "no longer readable" not in page
    out = tmp_path / "again"  # what we export, we read
    assert cli.invoke(["export", "clip-retrieval", "--root", str(root), "--out", str(out)]) == 0
    assert [f.stem for f in sources.list_embeddings(str(out))] == ["img_emb_0", "img_emb_1"]


def test_shards_bring_pictures_and_a_model_brings_words(tiny_shards, tmp_path, ray_session, capfd):
    """The vector of each sample is that of one of four words, by the model that is named."""
    encoder = clip.load("pico-clip", "")
    words = encoder.encode_texts(["flag", "clock", "fish", "car"], 4)
    (tmp_path / "v").mkdir()
    for stem in ("00000", "00001"):
        with (tiny_shards / f"{stem}.tar").open("rb") as stream:
            samples = list(ShardReader(stream, None))
        x = words[np.arange(len(samples)) % 4] + 0.02 * np.random.default_rng(0).normal(
            size=(len(samples), words.shape[1])
        )
        table = pa.table({"key": [sample.key for sample in samples], "v": list(x)})
        pq.write_table(table, tmp_path / "v" / f"{stem}.parquet")
    root, model = tmp_path / "run", "embeddings.model=pico-clip"
    command = [*arguments(tmp_path / "v", root, model), *FEW_WORDS, "--shards", str(tiny_shards)]
    assert cli.invoke(command) == 0
    assert cli.invoke(["verify", "--root", str(root)]) == 0
    opened = pipeline.open_run(root)
    captions = tables.read(opened.paths.captions.file("captions.parquet"))
    kinds = set(captions["source"].to_pylist())
    assert "vocabulary" in kinds and "number" not in kinds
    trained = json.loads((root / "network" / "manifest.json").read_text())
    assert [view["name"] for view in trained["views"]] == ["images", "words"]
    labels = opened.labels().to_table()
    assert labels.num_rows == 2 * TINY + 3
    assert opened.image("00000/" + labels["key"][0].as_py()).mode == "RGB"
    page = (root / "report" / "index.html").read_text()
    assert 'src="data:image/webp' in page and "no longer readable" not in page
    with (root / "labeled" / "00001.tar").open("rb") as stream:
        first = next(iter(ShardReader(stream, None)))
    assert "cluster_id" in first.values["ratecluster"]
    assert cli.invoke(["index", "--root", str(root)]) == 0
    capfd.readouterr()
    assert cli.invoke(["search", "--root", str(root), "--text", "fish", "--json"]) == 0
    hits = json.loads(capfd.readouterr().out)["hits"]
    found = labels.filter(pc.equal(labels["sample_id"], hits[0]["sample_id"]))["index"][0].as_py()
    assert found % 4 == 2 and hits[0]["score"] > 0.9
    assert cli.invoke(["status", "--root", str(root), "--json"]) == 0
    stages = json.loads(capfd.readouterr().out)["stages"]
    assert {stage["rerun"] for stage in stages} == {"nothing"}
