"""Votes as the formula has them; separation by closed forms; no caption is repeated."""

import numpy as np
import pytest
import scipy.sparse as sp

from pipeline.caption import ranking, tokenization

ALL = ranking.neighbourhood([[1, 2], [0, 2], [0, 1]])  # three clusters, each next to both others
TWO = ranking.neighbourhood([[1], [0]])


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
    found = ranking.votes(x, clusters, texts, 3, temperature)
    assert found.total.toarray() == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(ranking, "BATCH_ROWS", 2)
    again = ranking.votes(x, clusters, texts, 3, temperature)
    assert again.total.toarray() == pytest.approx(found.total.toarray(), abs=1e-6)
    assert (again.fits != found.fits).nnz == 0


def test_the_nearest_candidates_fit_a_member():
    rng = np.random.default_rng(1)
    x, texts = unit(rng.normal(size=(9, 6))), unit(rng.normal(size=(30, 6)))
    clusters = rng.integers(3, size=9)
    expected = np.zeros((3, 30))
    for row, number in zip(x, clusters, strict=True):
        expected[number, np.argsort(-(texts @ row))[:5]] += 1  # the root of 30
    for temperature in (0.001, 1.0):  # a softmax of 0 does not change the order
        found = ranking.votes(x, clusters, texts, 3, temperature)
        assert found.fits.toarray().tolist() == expected.tolist()


def test_votes_of_parts_add_up():
    rng = np.random.default_rng(2)
    x, texts = unit(rng.normal(size=(9, 6))), unit(rng.normal(size=(30, 6)))
    clusters = rng.integers(3, size=9)
    whole = ranking.votes(x, clusters, texts, 3, 0.1)
    found = ranking.Votes.none(3, 30)
    for part in (slice(4), slice(4, 9)):
        found += ranking.votes(x[part], clusters[part], texts, 3, 0.1)
    assert found.total.toarray() == pytest.approx(whole.total.toarray())
    assert (found.fits != whole.fits).nnz == 0


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
    """Of two equally frequent words, the one of the cluster farther away wins."""
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


def fits_of(rows: list[list[float]], members: int) -> sp.csr_matrix:
    """Counts of `members` each; further columns make every member fit the root of all columns."""
    counts = np.array(rows) * members
    near = counts.shape[1]
    rest = np.zeros((len(rows), near * near - near))
    rest[np.arange(len(rows)), np.arange(len(rows))] = near * members - counts.sum(axis=1)
    return sp.csr_matrix(np.hstack([counts, rest]))


def shares_of(rows: list[list[float]], members: int) -> np.ndarray:
    fits = fits_of(rows, members)
    return ranking.shares(ranking.fitting(ranking.Votes(fits, fits))).toarray()


def test_shares_are_those_of_the_members_less_those_elsewhere():
    found = shares_of([[1, 0.5, 0.25], [1, 0.1, 0], [1, 0, 0]], 20)
    assert found[:, 0].tolist() == [0, 0, 0]  # fits everything
    assert found[0, 1:3] == pytest.approx([0.5 - 0.05, 0.25])
    assert found[1, 1:3] == pytest.approx([0, 0]) and found[2, 1:3].tolist() == [0, 0]
    assert found.min() >= 0


def test_shares_of_one_cluster_are_those_of_its_members():
    assert shares_of([[1, 0.5]], 10)[0, :2] == pytest.approx([1, 0.5])


def test_combined_adds_what_pictures_and_texts_separate():
    total, texts = (
        sp.csr_matrix([[3.0, 1], [0, 0], [0, 2]]),
        sp.csr_matrix([[0, 0.7], [0.2, 0], [0, 0]]),
    )
    shares = sp.csr_matrix([[0.75, 0.25], [0, 0], [0, 1]])
    expected = ranking.separation(shares, ALL).toarray() + texts.toarray()
    nothing = sp.csr_matrix((3, 2))
    found = ranking.combine(ranking.Votes(total, nothing), texts, ALL)
    assert found.toarray() == pytest.approx(ranking.UNSURE * expected)
    assert ranking.best(found) == expected.argmax(axis=1).tolist() == [0, 0, 1]
    fits = sp.csr_matrix([[0, 4.0], [4, 0], [4, 0]])  # of four members each
    found = ranking.combine(ranking.Votes(total, fits), texts, ALL).toarray()
    assert found[0] == pytest.approx(expected[0] * [ranking.UNSURE, 1])
    assert found[2] == pytest.approx(expected[2] * ranking.UNSURE)


def test_a_phrase_of_the_texts_needs_the_pictures():
    """Two of three texts say "facing right", but the pictures are of a person."""
    texts, total = sp.csr_matrix([[0.3, 0.2], [0, 0]]), sp.csr_matrix((2, 2))
    fits = sp.csr_matrix([[0, 9.0], [9, 0]])
    assert ranking.best(ranking.combine(ranking.Votes(total, fits), texts, TWO)) == [1, None]


def test_a_word_that_fits_everything_yields_to_one_that_fits_this_cluster():
    """Votes for "animal" (0) are more than for "velvet" (1), but it fits all clusters."""
    total = sp.csr_matrix([[6.0, 1, 0], [1, 0, 9], [1, 0, 9]])
    few = sp.csr_matrix((3, 3))
    assert ranking.best(ranking.combine(ranking.Votes(total, few), few, ALL))[0] == 0
    fits = fits_of([[1, 0.8, 0], [1, 0.1, 1], [1, 0.1, 1]], 10)
    wide = sp.csr_matrix((3, 6))
    found = ranking.Votes(sp.hstack([total, wide]).tocsr(), fits)
    assert ranking.best(ranking.combine(found, sp.csr_matrix((3, 9)), ALL))[0] == 1


def test_best_is_the_first_of_the_largest():
    assert ranking.best(sp.csr_matrix([[0, 2.0, 1, 2], [0, 0, 0, 0]])) == [1, None]


def captions(scores: list[float], names: list[str], vectors: np.ndarray | None = None) -> list[str]:
    texts = np.eye(len(names), dtype=np.float32) if vectors is None else unit(vectors)
    [found] = ranking.rank(sp.csr_matrix([scores]), [tokenization.key(n) for n in names], texts)
    return [names[i] for i in found]


def test_ranked_is_by_score_with_ties_in_the_order_of_candidates():
    assert captions([1, 3, 1, 0], ["apple", "bird", "cup", "desk"]) == ["bird", "apple", "cup"]
    assert captions([0, 0], ["apple", "bird"]) == []


def test_what_was_said_is_not_said_again():
    names = ["flag", "red flag", "flags", "Flags of Sudan", "boat", "写真", "写", "犬の写真"]
    scores = [9.0, 8, 7, 6, 5, 4, 3, 2]
    assert captions(scores, names) == ["flag", "boat", "写真"]
    assert captions([1.0, 2, 0, 0, 0, 0, 0, 0], names) == ["red flag"]


def test_near_synonyms_give_way_to_what_is_new_and_nearly_as_good():
    axes = np.eye(5)
    vectors = np.array([axes[0], axes[0] + 0.1 * axes[1], axes[2], axes[3], axes[4]])
    names = ["dog", "hound", "park", "ball", "tree"]
    assert captions([1.0, 0.5, 0.45, 0, 0], names, vectors) == ["dog", "park", "hound"]
    assert captions([1.0, 0.99, 0.1, 0, 0], names, vectors) == ["dog", "hound", "park"]


def test_what_hardly_counts_is_not_said_for_being_new():
    assert captions([1.0, 0.5, 0.09, 0.11], ["dog", "hound", "mushroom", "puppy"]) == [
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
    found = captions([float(i + 1) for i in range(60)], names)
    assert len(found) == ranking.RANKED and found[0] == names[-1]
    assert not set(found) & set(names[:10])  # not in the pool


def named(
    scores: list[list[float]], words: list[str], fit: list[list[float]], others=()
) -> list[str]:
    """The names of clusters, by scores and by the shares of members that the words fit."""
    places = [np.argsort(-np.array(row), kind="stable")[: np.count_nonzero(row)] for row in scores]
    found = ranking.name(
        sp.csr_matrix(scores),
        sp.csr_matrix(fit),
        [row.tolist() for row in places],
        [tokenization.key(word) for word in words],
        others,
    )
    return [ranking.AND.join(words[i] for i in chosen) for chosen in found]


def test_the_name_is_the_best_candidate():
    words, scores = ["apple", "bird", "cup"], [[1.0, 2, 0], [0, 1, 3], [0, 0, 0]]
    assert named(scores, words, [[0, 1, 0], [0, 0, 1], [0, 0, 0]]) == ["bird", "cup", ""]


def test_the_cluster_with_the_best_score_keeps_a_word_and_others_add_one():
    words = ["flag", "flags", "star", "cross"]
    scores = [[5.0, 0, 3, 0], [0, 9, 0, 1], [4, 0, 3, 2], [3, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    fit = [[1.0, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    names = named(scores, words, fit)
    assert names == ["flag / star", "flags", "flag / cross", "flag", "", ""]


def test_the_second_word_fits_many():
    words = ["flag", "star", "cross"]
    fit = [[1.0, 0, 0], [1, 0.2, 0.5], [0, 0, 0], [0, 0, 0]]
    scores = [[9.0, 0, 0], [5, 3, 2], [0, 0, 0], [0, 0, 0]]
    assert named(scores, words, fit)[:2] == ["flag", "flag / cross"]


def test_a_word_alone_and_the_word_with_another_are_two_names():
    fit = [[0.4, 0.3], [0.9, 0.1], [0, 0]]
    assert named([[9.0, 1], [5, 1], [0, 0]], ["flag", "star"], fit) == ["flag / star", "flag", ""]


def test_a_weak_name_has_two_words():
    words, scores = ["trousers", "jeans", "tree"], [[3.0, 2, 2.5]]
    assert named(scores, words, [[0.49, 0.4, 0.1]]) == ["trousers / jeans"]
    assert named(scores, words, [[0.5, 0.4, 0.1]]) == ["trousers"]
    assert named([[1.0, 0, 0]], words, [[0.1, 0, 0]]) == ["trousers"]  # there is no other
    common = [[0.9, 0.4, 0.1], [0.7, 0, 0]]  # fits the other cluster, too
    assert named([*scores, [0, 0, 0]], words, common) == ["trousers / jeans", ""]


def test_a_part_has_not_the_name_of_the_whole():
    words, scores, fit = (
        ["animal", "dog", "cat"],
        [[9.0, 2, 0], [8, 0, 1]],
        [[1.0, 1, 0], [1, 0, 1]],
    )
    others = [{frozenset({("animal",)})}, set()]
    assert named(scores, words, fit, others) == ["animal / dog", "animal / cat"]
    others = [{frozenset({("animal",)}), frozenset({("animal",), ("dog",)})}, set()]
    assert named(scores, words, fit, others)[0] == "animal"  # there is no other


def test_votes_of_unions_are_sums():
    found = ranking.Votes(sp.csr_matrix(np.eye(3)), sp.csr_matrix(2 * np.eye(3)))
    united = found.merged(np.array([1, 0, 1]))
    assert united.total.toarray().tolist() == [[0, 1, 0], [1, 0, 1]]
    assert united.fits.toarray().tolist() == [[0, 2, 0], [2, 0, 2]]


def test_a_thousand_clusters_have_a_thousand_names():
    rng = np.random.default_rng(4)
    keys = [(f"word{i}",) for i in range(60)]
    scores = rng.random((1000, 60)) * (rng.random((1000, 60)) < 0.5)
    places = ranking.rank(sp.csr_matrix(scores), keys, unit(rng.normal(size=(60, 8))))
    found = ranking.name(sp.csr_matrix(scores), sp.csr_matrix(rng.random((1000, 60))), places, keys)
    names = [frozenset(name) for name in found]
    for name, chosen in zip(names, places, strict=True):
        free = {frozenset(chosen[:1]), *(frozenset((chosen[0], i)) for i in chosen)} - set(names)
        assert name <= set(chosen) and chosen[0] in name
        assert names.count(name) == 1 or not free


def test_texts_alone_are_weighted_by_the_texts_that_hold_a_word():
    texts = sp.csr_matrix([[0.5, 0.4], [0, 0.4]])
    fit = sp.csr_matrix([[1.0, 0.5], [0, 0.5]])
    found = ranking.by_texts_alone(texts, fit).toarray()
    assert found == pytest.approx(np.array([[0.5, 0.04], [0, 0.04]]))


def test_no_candidates_have_no_ranks():
    assert ranking.rank(sp.csr_matrix((2, 0)), [], np.zeros((0, 4), np.float32)) == [[], []]
