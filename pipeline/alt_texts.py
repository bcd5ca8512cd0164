"""What the samples' own alt texts say of their clusters: n-grams, counted and compared.

V candidates, k clusters.
"""

import math
import re
from collections import Counter

import numpy as np

NGRAM_WORDS = 3
KEPT_NGRAMS = 2000  # per cluster and task: bounds the memory of the counts
MIN_SHARE = 0.05  # of a cluster's alt texts must hold an n-gram that becomes a candidate
STOPWORDS = frozenset(
    """a an and are as at be by for from has have in into is it its of on or that the this to was
    with you your i we he she they not no""".split()  # noqa: SIM905 - a list of words reads as one
)
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*", re.UNICODE)

Counts = list[Counter[str]]  # of each cluster: alt texts that hold an n-gram; "" counts all texts


def ngrams(text: str) -> set[str]:
    """The n-grams of 1 to 3 words of an alt text that neither begin nor end in a stop word."""
    words = WORD.findall(text.lower())
    found = set()
    for start in range(len(words)):
        for stop in range(start + 1, min(start + NGRAM_WORDS, len(words)) + 1):
            if words[start] not in STOPWORDS and words[stop - 1] not in STOPWORDS:
                found.add(" ".join(words[start:stop]))
    return found


def trimmed(counter: Counter[str]) -> Counter[str]:
    """The KEPT_NGRAMS commonest of one cluster, ties by name."""
    if len(counter) <= KEPT_NGRAMS:
        return counter
    return Counter(
        dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:KEPT_NGRAMS])
    )


def shares(counts: Counts) -> list[dict[str, float]]:
    """Of each cluster: the share of its alt texts that hold an n-gram, where it is no rarity."""
    return [
        {name: n / counter[""] for name, n in counter.items() if name and n >= 2}
        for counter in counts
    ]


def distinctive(counts: Counts, per_cluster: int) -> list[str]:
    """The n-grams of largest class-based tf-idf of each cluster, all clusters together, sorted.

    tf is the share of the cluster's texts that hold the n-gram (at least MIN_SHARE), idf is
    log(1 + clusters / sum of its shares) as in BERTopic's c-TF-IDF (Grootendorst 2022), with
    shares in place of counts so that large clusters do not rule.
    """
    found = shares(counts)
    spread = _spread(found)
    chosen: set[str] = set()
    for own in found:
        scores = {
            name: share * math.log(1 + len(counts) / spread[name])
            for name, share in own.items()
            if share >= MIN_SHARE
        }
        chosen.update(sorted(scores, key=lambda name: (-scores[name], name))[:per_cluster])
    return sorted(chosen)


def text_scores(counts: Counts, names: list[str]) -> np.ndarray:
    """How well each candidate sums up the alt texts of each cluster, (k, V), 0 to 1.

    The share of the cluster's texts that hold it, times its share of all clusters' such shares: 1
    where every text of this cluster holds it and none of another.
    """
    found = shares(counts)
    spread = _spread(found)
    scores = np.zeros((len(counts), len(names)))
    column_of = {name.lower(): column for column, name in enumerate(names)}
    for row, own in zip(scores, found, strict=True):
        for name, share in own.items():
            if share >= MIN_SHARE and name in column_of:
                row[column_of[name]] = share * share / spread[name]
    return scores


def _spread(found: list[dict[str, float]]) -> dict[str, float]:
    """The sum over clusters of the shares of each n-gram."""
    spread: dict[str, float] = {}
    for own in found:
        for name, share in own.items():
            spread[name] = spread.get(name, 0.0) + share
    return spread
