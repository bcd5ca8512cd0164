"""Captions: votes as the formula has them, and no truth among them.

`small_run` has labels in its json; the word SECRET there must never come out.
"""

import numpy as np
import pytest

from pipeline import artifacts, caption
from pipeline.errors import UserError
from pipeline.store import tables
from pipeline.vision import clip
from tests import interrupting, small_run


@pytest.fixture
def paths(tmp_path):
    rng = np.random.default_rng(0)
    directions = {thing: rng.normal(size=6) for thing in small_run.THINGS}

    def vector(thing: str) -> np.ndarray:
        x = directions[thing] + rng.normal(size=6) / 5
        return x / np.linalg.norm(x)

    return artifacts.RunPaths(str(small_run.build(tmp_path, vector)))


STEMS = ["00000", "00001"]


def oracle(paths, texts: np.ndarray, temperature: float) -> np.ndarray:
    total = np.zeros((3, len(texts)))
    for stem in STEMS:
        rows = tables.read(paths.embeddings.file(f"{stem}.parquet"))
        clusters = tables.read(paths.assignments.file(f"{stem}.parquet"))["cluster_id"]
        for x, number in zip(
            tables.to_matrix(rows["embedding"]), clusters.to_pylist(), strict=True
        ):
            logits = texts.astype(np.float64) @ x.astype(np.float64) / temperature
            shares = np.exp(logits - logits.max())
            shares /= shares.sum()
            for index in np.argsort(-shares)[: caption.TOP_VOTES]:
                total[number, index] += shares[index]
    return total


@pytest.mark.parametrize(("candidates", "temperature"), [(40, 0.1), (40, 1.0), (3, 0.05)])
def test_votes_are_the_largest_softmax_shares_of_each_member(
    paths, monkeypatch, candidates, temperature
):
    rng = np.random.default_rng(1)
    texts = rng.normal(size=(candidates, 6)).astype(np.float32)
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    expected = oracle(paths, texts, temperature)
    found = caption.votes(STEMS, paths, texts, 3, temperature).toarray()
    assert found == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(caption, "BATCH_ROWS", 2)
    again = caption.votes(STEMS, paths, texts, 3, temperature).toarray()
    assert again == pytest.approx(found, abs=1e-6)
    parts = sum(caption.votes([stem], paths, texts, 3, temperature).toarray() for stem in STEMS)
    assert parts == pytest.approx(found)


def test_votes_of_other_samples_are_refused(paths):
    url = paths.assignments.file("00001.parquet")
    tables.write(url, tables.read(url).slice(1))
    with pytest.raises(RuntimeError, match=r"caption: 00001: .*different samples"):
        caption.votes(STEMS, paths, np.eye(2, 6, dtype=np.float32), 3, 0.1)


def test_combined_adds_shares_of_votes_and_of_texts():
    total = np.array([[3.0, 1.0], [0.0, 0.0]])
    texts = np.array([[0.0, 1.0], [0.5, 0.0]])
    assert caption.combined(total, texts) == pytest.approx(np.array([[0.75, 1.25], [0.5, 0]]))


def test_ranked_is_by_score_with_ties_in_the_order_of_candidates():
    total = np.array([[1.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], np.ones(4)])
    rows = caption.ranked(total, ["a", "b", "c", "d"], {"c"}).to_pylist()
    first = [row for row in rows if row["cluster_id"] == 0]
    assert [(r["rank"], r["caption"]) for r in first] == [(0, "b"), (1, "a"), (2, "c")]
    assert [r["share"] for r in first] == pytest.approx([0.6, 0.2, 0.2])
    assert [r["source"] for r in first] == ["vocabulary", "vocabulary", "alt text"]
    assert not [row for row in rows if row["cluster_id"] == 1]
    assert [r["caption"] for r in rows if r["cluster_id"] == 2] == ["a", "b", "c", "d"]


def test_no_more_than_ten_are_kept():
    table = caption.ranked(np.arange(50.0)[None] + 1, [f"n{i}" for i in range(50)], set())
    assert table["caption"].to_pylist() == [f"n{i}" for i in range(49, 39, -1)]


def test_words_are_counted_from_texts_and_never_from_json(paths):
    counts = caption.count_ngrams(STEMS, paths, 3)
    words = [set(counter) - {""} for counter in counts]
    assert words[0] == {"ein", "großer", "hund", "ein großer", "großer hund", "ein großer hund",
                        "dog"}  # fmt: skip
    assert words[1] == {"red", "blue", "car", "red car", "blue car"}
    assert words[2] == set()
    assert [counter[""] for counter in counts] == [2, 2, 0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"temperature": 0.0}, "caption.temperature = 0.0"),
        ({"alt_texts": -1}, "caption.alt_texts"),
        ({"templates": ("a photo",)}, "'a photo' must hold {} exactly once"),
        ({"templates": ("{} and {}",)}, "exactly once"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(UserError) as caught:
        caption.Config(**settings)
    assert said in str(caught.value)


# ---- run


@pytest.fixture(scope="module")
def pico():
    """pico-clip's text vectors of the three things."""
    encoder = clip.load("pico-clip", "")
    return dict(zip(small_run.THINGS, encoder.encode_texts(small_run.THINGS, 3), strict=True))


@pytest.mark.ray
def test_a_run_names_what_the_vectors_are_of(tmp_path, pico, ray_session):
    truth = b'{"label": "SECRET", "caption": "SECRET"}'
    first = [{"jpg": t.encode(), "json": truth} for t in small_run.THINGS * 4]
    second = [{"jpg": b"car", "txt": b"the zorgmobile", "json": truth}] * 4
    root = small_run.build(tmp_path, pico.__getitem__, (first, second))
    paths = artifacts.RunPaths(str(root))
    manifest = caption.run(caption.Config(alt_texts=5), paths)
    rows = tables.read(paths.captions.file("captions.parquet")).to_pylist()
    best = {row["cluster_id"]: row["caption"] for row in rows if row["rank"] == 0}
    assert best[0] == "dog" and "pizza" in best[2]
    assert manifest["captions"] == [best[0], best[1], best[2]]
    assert "SECRET" not in str(rows) and "secret" not in str(rows)
    sources = {row["caption"]: row["source"] for row in rows if row["cluster_id"] == 1}
    assert sources["car"] == "vocabulary" and sources["zorgmobile"] == "alt text"
    assert manifest["from_alt_texts"] == 1
    data = (root / "captions" / "captions.parquet").read_bytes()

    assert caption.run(caption.Config(alt_texts=5), paths) == manifest
    words = tmp_path / "words.txt"
    words.write_text("hound\nautomobile\nDog\n")
    own = caption.run(caption.Config(vocabulary=(str(words),), alt_texts=0), paths)
    assert own["candidates"] == 3 and own["from_alt_texts"] == 0
    assert own["captions"][0] in ("Dog", "hound") and own["captions"][1] == "automobile"
    caption.run(caption.Config(alt_texts=5), paths)
    assert (root / "captions" / "captions.parquet").read_bytes() == data


@pytest.mark.ray
@pytest.mark.parametrize("results", [0, 1, 2, 3])  # 2 chunks in each of two passes
def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path, pico, ray_session, monkeypatch, results
):
    root = small_run.build(tmp_path, pico.__getitem__)
    paths = artifacts.RunPaths(str(root))
    caption.run(caption.Config(), paths)
    table = root / "captions" / "captions.parquet"
    expected = table.read_bytes()
    paths.captions.clear()
    with monkeypatch.context() as patch:
        interrupting.after(patch, results)
        with pytest.raises(interrupting.Interrupted):
            caption.run(caption.Config(), paths)
    with monkeypatch.context() as patch:
        counted = interrupting.after(patch, 99)
        caption.run(caption.Config(), paths)
    assert len(counted) == 4 - results
    assert table.read_bytes() == expected
    assert paths.captions.names() == {"captions.parquet", "manifest.json"}
