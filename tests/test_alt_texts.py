from collections import Counter

import numpy as np
import pytest

from pipeline import alt_texts


def test_ngrams_neither_begin_nor_end_in_a_stop_word():
    assert alt_texts.ngrams("A bowl of Soup") == {"bowl", "soup", "bowl of soup"}
    assert alt_texts.ngrams("the cat on the mat") == {"cat", "mat"}  # four words would be too many
    assert alt_texts.ngrams("red wooden chair") == {
        "red", "wooden", "chair", "red wooden", "wooden chair", "red wooden chair",
    }  # fmt: skip
    assert alt_texts.ngrams("of the and") == alt_texts.ngrams("  _ !? ") == set()


def test_ngrams_are_of_words_in_any_script():
    assert alt_texts.ngrams("Ein GROẞER Hund’s Ball") >= {"hund’s ball", "großer"}
    assert alt_texts.ngrams("T-shirt_red 日本") >= {"t-shirt", "red", "日本", "t-shirt red"}


def counts_of(*clusters: list[str]) -> alt_texts.Counts:
    counts: alt_texts.Counts = [Counter() for _ in clusters]
    for counter, texts in zip(counts, clusters, strict=True):
        for text in texts:
            counter.update(alt_texts.ngrams(text) | {""})
    return counts


DOGS = ["photo dog park", "photo dog", "photo dog beach", "photo dog park"]
CARS = ["photo car", "photo car street", "photo red car"] * 20


def test_what_sets_clusters_apart_is_chosen_and_not_what_is_common():
    assert alt_texts.distinctive(counts_of(DOGS, CARS), 2) == [
        "car",
        "dog",
        "photo car",
        "photo dog",
    ]
    assert alt_texts.distinctive(counts_of(DOGS, CARS), 1) == ["car", "dog"]


@pytest.mark.parametrize("per_cluster", range(1, 8))
def test_the_choice_is_that_of_the_formula(per_cluster):
    """share × log(1 + clusters / sum of shares), computed text by text."""
    clusters = (DOGS, CARS, ["photo fish", "fish red", "fish"])
    words = {word for texts in clusters for text in texts for word in alt_texts.ngrams(text)}
    hits = {w: [sum(w in alt_texts.ngrams(t) for t in texts) for texts in clusters] for w in words}
    expected = set()
    for number in range(3):
        scores = {}
        for word, counted in hits.items():
            shares = [
                n / len(texts) if n >= 2 else 0 for n, texts in zip(counted, clusters, strict=True)
            ]
            if shares[number] >= alt_texts.MIN_SHARE:
                scores[word] = shares[number] * np.log(1 + 3 / sum(shares))
        expected |= set(sorted(scores, key=lambda w: (-round(scores[w], 12), w))[:per_cluster])
    assert alt_texts.distinctive(counts_of(*clusters), per_cluster) == sorted(expected)


def test_rarities_are_no_candidates():
    texts = ["dog"] * 100 + ["zebra"] * 4 + ["lynx lynx"] + ["emu"] * 6
    found = alt_texts.distinctive(counts_of(texts, ["cat", "cat"]), 10)
    assert found == ["cat", "dog", "emu"]  # zebra: less than MIN_SHARE; lynx: one text


def test_clusters_without_texts_have_no_candidates():
    assert alt_texts.distinctive(counts_of([], []), 5) == []
    assert alt_texts.distinctive(counts_of([], ["dog", "dog"]), 5) == ["dog"]
    assert (alt_texts.text_scores(counts_of([], ["dog", "dog"]), ["dog", "cat"])[0] == 0).all()


def test_trimmed_keeps_the_commonest_and_the_number_of_texts(monkeypatch):
    monkeypatch.setattr(alt_texts, "KEPT_NGRAMS", 4)
    counter = Counter({"": 9, "b": 3, "a": 3, "d": 3, "c": 5, "z": 1})
    assert alt_texts.trimmed(counter) == {"": 9, "c": 5, "a": 3, "b": 3}
    small = Counter({"": 2, "a": 1})
    assert alt_texts.trimmed(small) is small


def test_text_scores_are_one_where_only_this_cluster_says_it():
    counts = counts_of(["dog", "dog"], ["cat dog", "cat"], ["cat dog"] * 2)
    scores = alt_texts.text_scores(counts, ["Cat", "dog", "fish"])
    assert scores[0] == pytest.approx([0, 1 * 1 / (1 + 1), 0])  # dog: shares 1, -, 1
    assert scores[2] == pytest.approx([1 / 2, 1 / 2, 0])
    assert scores[1] == pytest.approx([1 / 2, 0, 0])  # one dog alone is a rarity
    assert alt_texts.text_scores(counts_of(["dog"] * 2, ["cat"] * 2), ["dog"])[0] == [1]
