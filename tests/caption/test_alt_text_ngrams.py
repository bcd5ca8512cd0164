from collections import Counter

import numpy as np
import pytest

from pipeline.caption import alt_text_ngrams, ranking

TWO, THREE = ([[1], [0]], [[1, 2], [0, 2], [0, 1]])


def test_ngrams_neither_begin_nor_end_in_a_stop_word():
    assert alt_text_ngrams.ngrams("A bowl of Soup") == {"bowl", "soup", "bowl of soup"}
    assert alt_text_ngrams.ngrams("the cat on the mat") == {
        "cat",
        "mat",
    }  # four words would be too many
    assert alt_text_ngrams.ngrams("red wooden chair") == {
        "red", "wooden", "chair", "red wooden", "wooden chair", "red wooden chair",
    }  # fmt: skip
    assert alt_text_ngrams.ngrams("of the and") == alt_text_ngrams.ngrams("  _ !? ") == set()


def test_ngrams_are_of_words_in_any_script():
    assert alt_text_ngrams.ngrams("Ein GROẞER Hund’s Ball") >= {"hund’s ball", "großer"}
    assert alt_text_ngrams.ngrams("كلب صغير") == {"كلب", "صغير", "كلب صغير"}
    assert alt_text_ngrams.ngrams("हिन्दी") == {"हिन्दी"}


def test_scripts_without_spaces_are_cut_where_the_script_changes_and_han_into_characters():
    assert alt_text_ngrams.ngrams("赤い車の写真") == {"赤", "車", "写", "真", "写真"}
    assert alt_text_ngrams.ngrams("ドイツのいちご") == {"ドイツ", "のいちご"}
    assert alt_text_ngrams.ngrams("小さなT-shirt 日本") == {
        "小",
        "さな",
        "t-shirt",
        "日",
        "本",
        "日本",
    }
    assert "可爱的小" in alt_text_ngrams.ngrams(
        "可爱的小狗"
    ) and "可爱的小狗" not in alt_text_ngrams.ngrams("可爱的小狗")


def counts_of(*clusters: list[str]) -> alt_text_ngrams.Counts:
    counts: alt_text_ngrams.Counts = [Counter() for _ in clusters]
    for counter, texts in zip(counts, clusters, strict=True):
        for text in texts:
            counter.update(alt_text_ngrams.ngrams(text) | {""})
    return counts


def distinctive(per_cluster: int, *clusters: list[str], near=None) -> list[str]:
    every = [[c for c in range(len(clusters)) if c != own] for own in range(len(clusters))]
    near = ranking.neighbourhood(every if near is None else near)
    return alt_text_ngrams.separation(counts_of(*clusters), near).distinctive(per_cluster)


DOGS = ["photo dog park", "photo dog", "photo dog beach", "photo dog park", "dog", "dog photo"]
CARS = ["photo car", "photo car street", "photo red car", "car"] * 20


def test_what_sets_clusters_apart_is_chosen_and_not_what_is_common():
    assert distinctive(1, DOGS, CARS) == ["car", "dog"]
    assert distinctive(2, DOGS, CARS) == ["car", "dog", "photo car", "photo dog"]


@pytest.mark.parametrize(
    ("texts", "word"),
    [
        (["赤い車の写真", "青い車", "車と空"], "車"),
        (["一只可爱的小狗", "小狗在公园", "黑色小狗"], "小狗"),  # and neither 小 nor 狗
        (["Ein großer Hund", "großer Hund am See", "der Hund"], "hund"),
        (["كلب صغير", "كلب في الحديقة", "صورة كلب"], "كلب"),
        (["ネコ、かわいい", "白いネコ", "ネコと空"], "ネコ"),
    ],
)
def test_the_word_of_a_cluster_is_found_in_any_language(texts, word):
    others = ["a photo of a ship", "ship at sea", "空の写真", "在公园的照片", "am See", "صورة"]
    assert word in distinctive(1, texts, others)


def test_neighbours_count_more_than_other_clusters():
    """Cluster 0 shares "pet" with its neighbour and "brown" with a far one, each as often."""
    own = ["pet brown"] * 4 + ["x"]
    found = distinctive(1, own, ["pet"] * 4, ["brown"] * 4, ["x"], near=[[1], [0], [3], [2]])
    assert "brown" in found
    swapped = distinctive(1, own, ["pet"] * 4, ["brown"] * 4, ["x"], near=[[2], [3], [0], [1]])
    assert "pet" in swapped


@pytest.mark.parametrize("per_cluster", range(1, 6))
def test_the_choice_is_that_of_the_formula(per_cluster):
    """share × log(1 + clusters / sum of shares) × own share of the neighbours', text by text."""
    clusters = (DOGS, CARS, ["photo fish", "fish red", "fish", "red", "photo"])
    words = {word for texts in clusters for text in texts for word in alt_text_ngrams.ngrams(text)}
    hits = {
        w: [sum(w in alt_text_ngrams.ngrams(t) for t in texts) for texts in clusters] for w in words
    }
    near = [[1], [2], [0]]
    expected = set()
    for number in range(3):
        scores = {}
        for word, counted in hits.items():
            shares = [
                n / len(texts) if n >= 2 else 0 for n, texts in zip(counted, clusters, strict=True)
            ]
            own, beside = shares[number], shares[near[number][0]]
            part = any(
                f" {word} " in f" {w} " and w != word and n[number] >= 0.9 * counted[number]
                for w, n in hits.items()
            )
            if own >= alt_text_ngrams.MIN_SHARE and not part:
                scores[word] = own * np.log(1 + 3 / sum(shares)) * own / (own + beside)
        expected |= set(sorted(scores, key=lambda w: (-round(scores[w], 12), w))[:per_cluster])
    assert distinctive(per_cluster, *clusters, near=near) == sorted(expected)


def test_rarities_are_no_candidates():
    texts = ["dog"] * 100 + ["zebra"] * 4 + ["lynx lynx"] + ["emu"] * 6
    found = distinctive(10, texts, ["cat", "cat"])
    assert found == ["cat", "dog", "emu"]  # zebra: less than MIN_SHARE; lynx: one text


def test_a_fragment_gives_way_to_the_phrase_it_is_said_in():
    phrase = ["falkland islands flag"] * 10
    assert distinctive(9, phrase, ["x", "x"]) == ["falkland islands flag", "x"]
    assert "flag" in distinctive(9, [*phrase, "flag", "flag"], ["x"])  # said without it, too


def test_a_fragment_in_the_vocabulary_has_no_score_from_the_phrase():
    counts = counts_of(["rainbow trout"] * 10, ["rainbow"] * 10)
    found = alt_text_ngrams.separation(counts, ranking.neighbourhood(TWO))
    scores = found.of(["rainbow", "trout", "rainbow trout"]).toarray()
    assert scores[0].tolist() == [0, 0, pytest.approx(1)] and scores[1, 0] > 0


def test_clusters_without_texts_have_no_candidates():
    assert distinctive(5, [], []) == []
    assert distinctive(5, [], ["dog", "dog"]) == ["dog"]
    found = alt_text_ngrams.separation(counts_of([], ["dog", "dog"]), ranking.neighbourhood(TWO))
    assert found.of(["dog", "cat"]).toarray().tolist() == [[0, 0], [1, 0]]
    assert found.of([]).shape == (2, 0)


def test_trimmed_keeps_the_commonest_and_the_number_of_texts(monkeypatch):
    monkeypatch.setattr(alt_text_ngrams, "KEPT_NGRAMS", 4)
    counter = Counter({"": 9, "b": 3, "a": 3, "d": 3, "c": 5, "z": 1})
    assert alt_text_ngrams.trim(counter) == {"": 9, "c": 5, "a": 3, "b": 3}
    small = Counter({"": 2, "a": 1})
    assert alt_text_ngrams.trim(small) is small


def test_candidates_have_the_scores_of_what_the_texts_hold():
    counts = counts_of(["dog", "dog"], ["cat dog", "cat"], ["cat dog", "dog cat"])
    found = alt_text_ngrams.separation(counts, ranking.neighbourhood(THREE))
    scores = found.of(["Cat", "dog", "fish"]).toarray()
    dog = np.log(1 + 3 / 2) / np.log(4) / 2  # shares 1, one text is a rarity, 1
    assert scores[0] == pytest.approx([0, dog, 0])
    assert scores[1] == pytest.approx([dog, 0, 0])
    assert scores[2] == pytest.approx([dog, dog, 0])


def test_below_a_twentieth_a_text_says_nothing_of_a_cluster():
    texts = ["dog"] * 100 + ["zebra"] * 4
    found = alt_text_ngrams.separation(counts_of(texts, ["cat", "cat"]), ranking.neighbourhood(TWO))
    assert found.of(["zebra"]).toarray().tolist() == [[0], [0]]


def test_a_word_fits_the_share_of_texts_that_hold_it():
    counts = counts_of(["a dog", "dog park", "cat"], ["car"], [])
    found = alt_text_ngrams.fitting(counts, ["dog", "car", "none"]).toarray()
    assert found == pytest.approx(np.array([[2 / 3, 0, 0], [0, 1, 0], [0, 0, 0]]))
    assert alt_text_ngrams.fitting(counts, []).shape == (3, 0)
