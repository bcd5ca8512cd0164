"""Captions against the truth: by hand where class names are left in, and without them."""

import numpy as np
import pytest
import scipy.sparse as sp

from benchmarks import caption_quality
from benchmarks.caption_quality import OURS, PLAIN, Voters
from pipeline.artifacts import layout
from pipeline.caption import candidates, ranking
from pipeline.evaluate import stage as evaluate
from pipeline.store import tables
from pipeline.vision import clip
from tests import fake_run, small_run

NEAR = ranking.neighbourhood([[1], [0]])


def test_voters_are_spread_over_all(monkeypatch):
    monkeypatch.setattr(caption_quality, "MAX_VOTERS", 3)
    some = Voters(np.eye(8), np.arange(8), np.arange(8).astype(str)).some()
    assert some.clusters.tolist() == [0, 3, 6] and some.truth.tolist() == ["0", "3", "6"]
    assert len(Voters(np.eye(3), np.arange(3), np.arange(3)).some().x) == 3


def test_class_names_go_with_their_plurals_and_in_more_words():
    names = [
        "cat",
        "Cats",
        "tabby cat",
        "catfish",
        "dog",
        "pickup trucks",
        "truck",
        "猫の写真",
        "…",
    ]
    kept = caption_quality.without_class_names(names, {"cat", "pickup truck", "猫", "&"})
    assert [names[i] for i in kept] == ["catfish", "dog", "truck", "…"]


def test_the_plain_vote_and_ours_differ_where_a_neighbour_says_the_same():
    """Both clusters vote most for hub; only the second thing of each tells them apart."""
    texts = np.eye(3, dtype=np.float32)
    x = np.array([[0.9, 0.44, 0], [0.9, 0, 0.44]], np.float32)
    voters = Voters(np.repeat(x, 4, axis=0), np.repeat([0, 1], 4), np.repeat(["a", "b"], 4))
    found = candidates.Candidates(["hub", "left", "right"], texts, sp.csr_matrix((2, 3)))
    best = caption_quality.best_captions(voters, found, NEAR, 1.0)
    assert best[PLAIN] == ["hub", "hub"] and best[OURS] == ["left", "right"]
    with_texts = candidates.Candidates(found.names, texts, sp.csr_matrix([[1, 0, 0], [0, 0, 0.0]]))
    assert caption_quality.best_captions(voters, with_texts, NEAR, 1.0)[OURS] == ["hub", "right"]
    none = found.only(np.array([], np.int64))
    assert caption_quality.best_captions(voters, none, NEAR, 1.0) == {
        OURS: [None] * 2,
        PLAIN: [None] * 2,
    }


def test_judged_are_the_clusters_with_both():
    found = caption_quality.judge(
        ["Dogs", "automobile", None, "zorg", "poodle"],
        ["dog", "car", "cat", "dog", None],
        lambda one, other: len(one) / 10,
    )
    assert (found["clusters"], found["path_known"]) == (3, 2)
    assert found["accuracy"] == pytest.approx(1 / 3, abs=1e-6)
    assert found["path_similarity"] == 1
    assert found["text_similarity"] == pytest.approx((0.4 + 1.0 + 0.4) / 3, abs=1e-6)
    nothing = caption_quality.judge([None], ["dog"], lambda *_: 0.0)
    assert nothing["accuracy"] is nothing["path_similarity"] is nothing["text_similarity"] is None


WORDS = ["dog", "car", "pizza", "dogs", "automobile", "cat"]


@pytest.fixture
def paths(tmp_path):
    """Clusters of dogs, cars and pizzas, whose vectors are those of the words."""
    encoder = clip.load("pico-clip", "")
    vectors = dict(zip(WORDS, encoder.encode_texts(WORDS, 6), strict=True))
    shard = [
        {"jpg": t.encode(), "json": b'{"label": "%s"}' % t.encode()} for t in small_run.THINGS * 4
    ]
    found = layout.RunPaths(str(small_run.build(tmp_path, vectors.__getitem__, (shard, shard))))
    texts = np.stack(list(vectors.values()))
    rows = candidates.rows(WORDS, len(WORDS), texts, sp.csr_matrix((3, len(WORDS))))
    tables.write(found.captions.file("candidates.parquet"), rows)
    config = {"temperature": 0.01, "templates": []}
    fake_run.refinish(found.captions, config=config, captions=["Dog", "car", "zorg"])
    return found


def test_a_run_is_compared_ours_with_the_plain_vote(paths):
    found = caption_quality.score_run(paths, "label")
    assert (found["voters"], found["candidates"], found["class_names"]) == (24, 6, 4)
    kinds = [(row["name"], row["class_names"]) for row in found["rows"]]
    assert kinds == [
        (OURS, "left in"), (PLAIN, "left in"), (OURS, "removed"), (PLAIN, "removed"),
    ]  # fmt: skip
    assert [row["accuracy"] for row in found["rows"]] == [
        pytest.approx(2 / 3, abs=1e-6), 1, 0, 0,
    ]  # fmt: skip
    assert found["rows"][1]["path_similarity"] == 1 == found["rows"][1]["text_similarity"]
    dog, car, _ = found["clusters"]
    assert dog == {
        "cluster_id": 0, "majority": "dog", "caption": "Dog", "plain": "dog",
        "caption_without": "cat", "plain_without": "cat",
    }  # fmt: skip
    assert car["plain_without"] == "automobile"
    shown = caption_quality.table(found)
    assert "plain top-5 vote" in shown and "captions of 3 clusters" in shown
    assert found["rows"][0]["text_similarity"] < 1


def test_class_names_are_out_of_the_vote_and_not_only_out_of_the_ranking(paths):
    """Votes of the others are those of a vocabulary that never held the names."""
    found, near = candidates.read(paths, 3), candidates.neighbourhood(paths)
    samples = evaluate.read_all(["00000", "00001"], "label", True, paths)
    voters = Voters(samples.embeddings, samples.clusters, samples.truth)
    kept = caption_quality.without_class_names(found.names, set(samples.truth))
    less = candidates.Candidates(["automobile", "cat"], found.texts[[4, 5]], sp.csr_matrix((3, 2)))
    assert caption_quality.best_captions(voters, found.only(kept), near, 0.01) == (
        caption_quality.best_captions(voters, less, near, 0.01)
    )


def test_table_is_aligned():
    row = {"name": OURS, "class_names": "left in", "clusters": 3, "accuracy": 1.0}
    row |= {"path_similarity": None, "text_similarity": 0.123}
    other = {
        **row,
        "name": PLAIN,
        "class_names": "removed",
        "accuracy": 0.0,
        "path_similarity": 0.5,
    }
    lines = caption_quality.table({"rows": [row, other]}).splitlines()
    assert lines[0].startswith("captions of 3 clusters")
    assert lines[2].split() == [OURS, "left", "in", "100.0", "-", "12.3"]
    assert lines[3].split()[-4:] == ["removed", "0.0", "50.0", "12.3"]
    assert len(lines[2]) == len(lines[3])
