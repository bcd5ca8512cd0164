"""Captions: from all parts, with no truth among them, the same after any interruption.

`small_run` has labels in its json; the word SECRET there must never come out.
"""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp

from pipeline.artifacts import layout, schemas, stages
from pipeline.caption import candidates, ranking
from pipeline.caption import settings as caption_settings
from pipeline.caption import stage as caption
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.vision import clip, vocabulary
from tests import interrupting, small_run
from tests.chat import saying, serving
from tests.conftest import WORDS


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    directions = {thing: rng.normal(size=6) for thing in small_run.THINGS}

    def vector(thing: str) -> np.ndarray:
        x = directions[thing] + rng.normal(size=6) / 5
        return x / np.linalg.norm(x)

    return layout.RunPaths(str(small_run.build(tmp_path, vector)))


STEMS = ["00000", "00001"]
THREE = np.arange(3)  # the finest level: a small group in each cluster


def test_votes_are_those_of_the_members_of_all_parts(paths):
    rng = np.random.default_rng(1)
    texts = rng.normal(size=(40, 6)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    found = caption.votes(STEMS, paths, texts, THREE, 0.1).total.toarray()
    parts = sum(caption.votes([s], paths, texts, THREE, 0.1).total.toarray() for s in STEMS)
    assert parts == pytest.approx(found)
    rows = [tables.read(paths.embeddings.file(f"{stem}.parquet")) for stem in STEMS]
    own = [tables.read(paths.assignments.file(f"{stem}.parquet"))["cluster_id"] for stem in STEMS]
    x = np.concatenate([tables.to_matrix(part["embedding"]) for part in rows])
    clusters = np.concatenate([part.to_numpy() for part in own])
    assert found == pytest.approx(ranking.votes(x, clusters, texts, 3, 0.1).total.toarray())


def test_votes_of_other_samples_are_refused(paths):
    url = paths.assignments.file("00001.parquet")
    tables.write(url, tables.read(url).slice(1))
    with pytest.raises(RuntimeError, match=r"00001: .*different samples"):
        caption.votes(STEMS, paths, np.eye(2, 6, dtype=np.float32), THREE, 0.1)


def test_the_table_has_the_chosen_with_their_shares_and_sources():
    found = candidates.rows(["a", "b", "c"], 2, np.eye(3, dtype=np.float32), sp.csr_matrix((3, 3)))
    sure = sp.csr_matrix([[0.1, 0.6, 0.2], [0, 0, 0], [0, 0.5, 0.4]])
    made = candidates.ranking_of(sure, [[1, 2], [], [1, 0, 2]], [[1], [], [1, 2]], found)
    rows = made.to_pylist()
    assert [(r["cluster_id"], r["rank"], r["caption"]) for r in rows] == [
        (0, 0, "b"), (0, 1, "c"), (2, 0, "b / c"), (2, 1, "a"),
    ]  # fmt: skip
    assert [r["share"] for r in rows] == pytest.approx([0.6, 0.2, 0.5, 0])
    assert [r["source"] for r in rows] == ["vocabulary", "alt text", "vocabulary", "vocabulary"]


def test_words_are_counted_from_captions_and_from_no_other_field_of_the_json(paths):
    counts = caption.count_ngrams(STEMS, paths, THREE)
    words = [set(counter) - {""} for counter in counts]
    assert words[0] == {"ein", "großer", "hund", "ein großer", "großer hund", "ein großer hund",
                        "dog", "json", "says", "json says"}  # fmt: skip
    assert words[1] == {"red", "blue", "car", "red car", "blue car"}
    assert words[2] == set()
    assert [counter[""] for counter in counts] == [3, 2, 0]


def test_ngrams_that_end_with_a_modifier_of_the_vocabulary_are_no_candidates():
    vocabulary = ["large square", "Circle", "right arrow", "arrow"]
    ngrams = ["large", "facing right", "red square", "circle", "zorgmobile", "小狗"]
    assert caption._new_names(ngrams, vocabulary) == ["red square", "zorgmobile", "小狗"]
    assert caption._new_names(["right"], [*vocabulary, "right"]) == []  # known, not new


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "caption.temperature = 0.0"),
        ({"alt_texts": -1}, "caption.alt_texts"),
        ({"templates": ("a photo",)}, "'a photo' must contain {} exactly once, or be one of open"),
        ({"templates": ("openai", "{} and {}")}, "exactly once"),
        ({"namer": "http://localhost"}, "needs caption.namer_model"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(UserError) as caught:
        caption_settings.Config(**settings)
    assert message in str(caught.value)


# ---- run

FEW_WORDS = caption_settings.Config(vocabulary=(str(WORDS),))


@pytest.fixture(scope="module")
def pico():
    """pico-clip's text vectors of the three things."""
    encoder = clip.load("pico-clip", "")
    return dict(zip(small_run.THINGS, encoder.encode_texts(small_run.THINGS, 3), strict=True))


@pytest.mark.ray
def test_a_run_names_what_the_vectors_are_of(tmp_path, pico, ray_session):
    truth = b'{"label": "SECRET"}'
    first = [{"jpg": t.encode(), "json": truth} for t in small_run.THINGS * 4]
    second = [{"jpg": b"car", "txt": b"the zorgmobile", "json": truth}] * 4
    root = small_run.build(tmp_path, pico.__getitem__, (first, second))
    paths = layout.RunPaths(str(root))
    manifest = caption.run(caption_settings.Config(alt_texts=5), paths)
    rows = tables.read(paths.captions.file("captions.parquet")).to_pylist()
    best = {row["cluster_id"]: row["caption"] for row in rows if row["rank"] == 0}
    assert best[0] == "dog" and "pizza" in best[2]
    assert manifest["captions"] == [best[0], best[1], best[2]]
    assert "SECRET" not in str(rows) and "secret" not in str(rows)
    sources = {row["caption"]: row["source"] for row in rows if row["cluster_id"] == 1}
    assert sources["zorgmobile"] == "alt text" and manifest["from_alt_texts"] == 1
    assert set(sources) - {"zorgmobile"} <= set(vocabulary.load_or_default((), "pico-clip"))
    found = candidates.read(paths, 3)
    assert len(found.names) == manifest["candidates"] and found.names[-1] == "zorgmobile"
    assert found.by_texts.toarray()[:, -1].tolist() == [0, pytest.approx(0.8, abs=0.2), 0]
    assert found.texts[found.names.index("dog")] == pytest.approx(pico["dog"], abs=1e-3)
    data = (root / "captions" / "captions.parquet").read_bytes()

    assert caption.run(caption_settings.Config(alt_texts=5), paths) == manifest
    words = tmp_path / "words.txt"
    words.write_text("hound\nautomobile\nDog\n")
    own = caption.run(caption_settings.Config(vocabulary=(str(words),), alt_texts=0), paths)
    assert own["candidates"] == 3 and own["from_alt_texts"] == 0
    assert own["captions"][0] in ("Dog", "hound") and own["captions"][1] == "automobile"
    caption.run(caption_settings.Config(alt_texts=5), paths)
    assert (root / "captions" / "captions.parquet").read_bytes() == data


@pytest.mark.ray
@pytest.mark.parametrize("results", [0, 1, 2, 3])  # 2 chunks in each of two passes
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path, pico, ray_session, monkeypatch, results
):
    root = small_run.build(tmp_path, pico.__getitem__)
    paths = layout.RunPaths(str(root))
    caption.run(FEW_WORDS, paths)
    table = root / "captions" / "captions.parquet"
    expected = table.read_bytes()
    paths.captions.clear()
    with monkeypatch.context() as patch:
        interrupting.after(patch, results)
        with pytest.raises(interrupting.Interrupted):
            caption.run(FEW_WORDS, paths)
    with monkeypatch.context() as patch:
        counted = interrupting.after(patch, 99)
        caption.run(FEW_WORDS, paths)
    assert len(counted) == 4 - results
    assert table.read_bytes() == expected
    assert paths.captions.names() == {*stages.named("caption").files, "manifest.json"}


@pytest.mark.ray
def test_a_model_names_the_clusters_and_nothing_is_counted_again(
    finished_run, tmp_path, monkeypatch
):
    root = tmp_path / "run"
    shutil.copytree(finished_run, root)
    paths = layout.RunPaths(str(root))
    before = paths.captions.manifest()
    voted = (root / "captions" / "voted.parquet").read_bytes()
    counted = interrupting.after(monkeypatch, 99)
    with serving(lambda *_: (200, saying('{"caption": "some named things"}'))) as chat:
        cfg = replace(FEW_WORDS, namer=chat.url, namer_model="tiny")
        manifest = caption.run(cfg, paths)
        assert caption.run(cfg, paths) == manifest
        assert len(chat.asked) == 4 == manifest["named"]
        caption.run(replace(FEW_WORDS, namer=chat.url, namer_model="other"), paths)
        assert len(chat.asked) == 8
    assert counted == [] and manifest["captions"] == ["some named things"] * 4
    assert (root / "captions" / "voted.parquet").read_bytes() == voted
    assert paths.captions.names() == {*stages.named("caption").files, "manifest.json"}
    assert caption.run(FEW_WORDS, paths)["captions"] == before["captions"]
    (root / "captions" / "candidates.parquet").unlink()
    caption.run(FEW_WORDS, paths)
    assert counted != [] and paths.captions.names() == {
        *stages.named("caption").files,
        "manifest.json",
    }


def test_a_cluster_without_a_caption_is_named_by_its_number():
    row = {"cluster_id": 1, "rank": 0, "caption": "dog", "share": 0.5, "source": "alt text"}
    ranked = pa.Table.from_pylist([row], schema=schemas.CAPTIONS)
    found = candidates.numbered(ranked, 3).to_pylist()
    assert found[0]["caption"] == "dog"
    names = [(r["cluster_id"], r["caption"], r["source"], r["share"]) for r in found[1:]]
    assert names == [(0, "cluster 0", "number", 0), (2, "cluster 2", "number", 0)]
