"""Votes as the formula has them; separation by closed forms; no caption is repeated."""

import numpy as np
import pytest
import scipy.sparse as sp

from pipeline.caption import ranking, tokenization

ALL = ranking.neighbourhood([[1, 2], [0, 2], [0, 1]])  # three clusters, each next to both others


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize(("candidates", "temperature"), [(40, 0.1), (40, 1.0), (3, 0.05)])
def test_votes_are_the_largest_softmax_shares_of_each_member(monkeypatch, candidates, temperature):
    rng = np.random.default_rng(1)
    x, texts = unit(rng.normal(size=(9, 6))), unit(rng.normal(size=(candidates, 6)))
    clusters = rng.integers(3, size=9)
    expected = np.zeros((3, candidates))
    for row, number in zip(x, clusters, strict=True):
        logits = texts.astype(float) @ row.astype(float) / temperature
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        for index in np.argsort(-shares)[: ranking.TOP_VOTES]:
            expected[number, index] += shares[index]
    found = ranking.votes(x, clusters, texts, 3, temperature).toarray()
    assert found == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(ranking, "BATCH_ROWS", 2)
    again = ranking.votes(x, clusters, texts, 3, temperature).toarray()
    assert again == pytest.approx(found, abs=1e-6)


def test_neighbourhood_has_a_one_for_each_neighbour():
    found = ranking.neighbourhood([[2], [], [0, 1]]).toarray()
    assert found.tolist() == [[0, 0, 1], [0, 0, 0], [1, 1, 0]]
    assert ranking.neighbourhood([[]]).toarray().tolist() == [[0]]


def test_separation_is_one_where_all_here_have_it_and_none_elsewhere():
    shares = sp.csr_matrix([[1.0, 1, 0], [0, 1, 0.5], [0, 1, 0]])
    found = ranking.separation(shares, ALL).toarray()
    assert found[0, 0] == pytest.approx(1)
    assert found[:, 1] == pytest.approx(np.log(2) / np.log(4) / 3)
    assert found[1, 2] == pytest.approx(0.5 * np.log(1 + 3 / 0.5) / np.log(4))
    assert found[[0, 0, 2], [2, 2, 0]].tolist() == [0, 0, 0]


def test_separation_is_from_neighbours_and_not_from_all():
    """Of two words said as often, here and in one other cluster, that of the farther one wins."""
    shares = sp.csr_matrix([[0.5, 0.5], [0.5, 0], [0, 0.5], [0, 0]])
    near = ranking.neighbourhood([[1], [0], [3], [2]])
    found = ranking.separation(shares, near).toarray()
    assert found[0, 1] == pytest.approx(2 * found[0, 0])
    every = ranking.neighbourhood([[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]])
    assert ranking.separation(shares, every)[0].toarray().tolist() == [[found[0, 0]] * 2]


def test_separation_stays_between_0_and_1_in_the_cells_of_the_shares():
    rng = np.random.default_rng(2)
    shares = sp.random(3, 50, 0.3, random_state=rng, format="csr")
    shares.data[::5] = 0  # stored, but nothing
    before = shares.copy()
    found = ranking.separation(shares, ALL)
    assert ((found.toarray() > 0) == (shares.toarray() > 0)).all()
    assert found.toarray().max() <= 1 and (shares != before).nnz == 0


def test_combined_adds_what_pictures_and_texts_separate():
    total, texts = (
        sp.csr_matrix([[3.0, 1], [0, 0], [0, 2]]),
        sp.csr_matrix([[0, 0.7], [0.2, 0], [0, 0]]),
    )
    shares = sp.csr_matrix([[0.75, 0.25], [0, 0], [0, 1]])
    expected = ranking.separation(shares, ALL).toarray() + texts.toarray()
    found = ranking.combine(total, texts, ALL)
    assert found.toarray() == pytest.approx(expected)
    assert ranking.best(found) == expected.argmax(axis=1).tolist() == [0, 0, 1]


def test_best_is_the_first_of_the_largest():
    assert ranking.best(sp.csr_matrix([[0, 2.0, 1, 2], [0, 0, 0, 0]])) == [1, None]


def said(scores: list[float], names: list[str], vectors: np.ndarray | None = None) -> list[str]:
    texts = np.eye(len(names), dtype=np.float32) if vectors is None else unit(vectors)
    [found] = ranking.rank(sp.csr_matrix([scores]), [tokenization.key(n) for n in names], texts)
    return [names[i] for i in found]


def test_ranked_is_by_score_with_ties_in_the_order_of_candidates():
    assert said([1, 3, 1, 0], ["apple", "bird", "cup", "desk"]) == ["bird", "apple", "cup"]
    assert said([0, 0], ["apple", "bird"]) == []


def test_what_was_said_is_not_said_again():
    names = ["flag", "red flag", "flags", "Flags of Sudan", "boat", "写真", "写", "犬の写真"]
    scores = [9.0, 8, 7, 6, 5, 4, 3, 2]
    assert said(scores, names) == ["flag", "boat", "写真"]
    assert said([1.0, 2, 0, 0, 0, 0, 0, 0], names) == ["red flag"]


def test_near_synonyms_give_way_to_what_is_new_and_nearly_as_good():
    axes = np.eye(5)
    vectors = np.array([axes[0], axes[0] + 0.1 * axes[1], axes[2], axes[3], axes[4]])
    names = ["dog", "hound", "park", "ball", "tree"]
    assert said([1.0, 0.5, 0.45, 0, 0], names, vectors) == ["dog", "park", "hound"]
    assert said([1.0, 0.99, 0.1, 0, 0], names, vectors) == ["dog", "hound", "park"]  # much worse


def test_what_hardly_counts_is_not_said_for_being_new():
    assert said([1.0, 0.5, 0.09, 0.11], ["dog", "hound", "mushroom", "puppy"]) == [
        "dog", "hound", "puppy",
    ]  # fmt: skip


def test_a_direction_that_all_texts_share_changes_nothing():
    rng = np.random.default_rng(3)
    names = [f"word{chr(97 + i)}" for i in range(12)]
    vectors, scores = unit(rng.normal(size=(12, 6))), (rng.random(12) + 0.5).tolist()
    keys = [tokenization.key(name) for name in names]
    plain = ranking.rank(sp.csr_matrix([scores]), keys, vectors)
    moved = ranking.rank(sp.csr_matrix([scores]), keys, vectors + np.float32(5))
    assert plain == moved


def test_ten_are_kept_and_the_best_is_first():
    names = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(60)]
    found = said([float(i + 1) for i in range(60)], names)
    assert len(found) == ranking.RANKED and found[0] == names[-1]
    assert not set(found) & set(names[:10])  # not in the pool
