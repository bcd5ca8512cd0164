"""N-grams of the samples' alt texts: counted per cluster, and compared between clusters.

V candidates, M n-grams, k clusters.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from pipeline.caption import ranking, tokenization

NGRAM_WORDS = 3
NGRAM_CHARACTERS = 4  # of Han, which has no spaces between words
KEPT_NGRAMS = 2000  # per cluster and task: bounds the memory of the counts
MIN_SHARE = 0.05  # of a cluster's alt texts must hold an n-gram, or it is no candidate
FRAGMENT = 0.9  # if so many texts with an n-gram hold one longer n-gram, the shorter is a fragment
STOPWORDS = frozenset(
    """a an and are as at be by for from has have in into is it its of on or that the this to was
    with you your i we he she they not no""".split()  # noqa: SIM905 - a list of words reads as one
)

Counts = list[Counter[str]]  # of each cluster: alt texts that hold an n-gram; "" counts all texts


def ngrams(text: str) -> set[str]:
    """The n-grams of 1 to 3 words of an alt text; none begins or ends with a stop word.

    A run of Han gives all n-grams of 1 to 4 characters. A run of Katakana gives itself. A run of
    Hiragana gives itself if it has more than one character: single ones are particles.
    """
    words, found = tokenization.words(text), set[str]()
    for start, word in enumerate(words):
        if tokenization.SPACELESS.match(word):
            found.update(_pieces(word))
            continue
        for stop in range(start + 1, min(start + NGRAM_WORDS, len(words)) + 1):
            last = words[stop - 1]
            if tokenization.SPACELESS.match(last):
                break
            if word not in STOPWORDS and last not in STOPWORDS:
                found.add(" ".join(words[start:stop]))
    return found


def _pieces(run: str) -> Iterator[str]:
    if "\u3041" <= run[0] <= "\u309f":
        yield from [run] * (len(run) > 1)
    elif "\u30a1" <= run[0] <= "\u30ff":
        yield run
    else:
        for start in range(len(run)):
            for stop in range(start + 1, min(start + NGRAM_CHARACTERS, len(run)) + 1):
                yield run[start:stop]


def trim(counter: Counter[str]) -> Counter[str]:
    """The KEPT_NGRAMS most frequent n-grams of one cluster; ties are broken by name."""
    if len(counter) <= KEPT_NGRAMS:
        return counter
    return Counter(
        dict(sorted(counter.items(), key=lambda item: (-item[1], item[0]))[:KEPT_NGRAMS])
    )


def merged(counts: Counts, clusters: np.ndarray) -> Counts:
    """The counts of unions: entry i is added to entry clusters[i]."""
    found: Counts = [Counter() for _ in range(clusters.max() + 1)]
    for number, counter in zip(clusters.tolist(), counts, strict=True):
        found[number].update(counter)
    return [trim(counter) for counter in found]


@dataclass(frozen=True)
class Separation:
    """How well each n-gram distinguishes each cluster, by the alt texts that hold it."""

    names: list[str]  # M n-grams, sorted
    scores: sp.csr_matrix  # (k, M), 0 to 1; 0 below MIN_SHARE, and for fragments of others

    def distinctive(self, per_cluster: int) -> list[str]:
        """The union of the best n-grams of each cluster, sorted by name."""
        chosen: set[str] = set()
        for row in range(self.scores.shape[0]):
            found = self._of_cluster(row)
            chosen.update(sorted(found, key=lambda name: (-found[name], name))[:per_cluster])
        return sorted(chosen)

    def _of_cluster(self, row: int) -> dict[str, float]:
        """The n-grams of one cluster with a score above 0."""
        cells = slice(*self.scores.indptr[row : row + 2])
        scored = zip(self.scores.indices[cells], self.scores.data[cells], strict=True)
        return {self.names[i]: score for i, score in scored if score > 0}

    def without_fragments(self, counts: Counts) -> "Separation":
        """The same scores, but 0 for n-grams that occur almost only inside a longer one.

        "rainbow" gives way to "rainbow trout", as in the C-value of terms (Frantzi et al. 2000).
        """
        scores, column_of = self.scores.copy(), {n: i for i, n in enumerate(self.names)}
        for row, counter in enumerate(counts):
            fragments = _fragments(self._of_cluster(row), counter)
            cells = slice(*scores.indptr[row : row + 2])
            gone = np.isin(scores.indices[cells], [column_of[name] for name in fragments])
            scores.data[cells][gone] = 0
        return Separation(self.names, scores)

    def of(self, candidates: Sequence[str]) -> sp.csr_matrix:
        """The scores of the candidates, (k, V); 0 for candidates that no text holds."""
        column_of = {name: column for column, name in enumerate(self.names)}
        old = np.array([column_of.get(name.lower(), -1) for name in candidates], np.int64)
        new = np.flatnonzero(old >= 0)
        shape = (len(self.names), len(candidates))
        pick = sp.csr_matrix((np.ones(len(new)), (old[new], new)), shape)
        return (self.scores @ pick).tocsr()


def separation(counts: Counts, near: sp.csr_matrix) -> Separation:
    """`ranking.separation` by the share of each cluster's texts that hold an n-gram.

    Shares below MIN_SHARE and fragments of longer n-grams score 0. `near` (k, k): the neighbours.
    """
    names = sorted({name for counter in counts for name, n in counter.items() if name and n >= 2})
    column_of = {name: column for column, name in enumerate(names)}
    rows, columns, values = [], [], []
    for row, counter in enumerate(counts):
        for name, n in counter.items():
            if name and n >= 2:
                rows.append(row)
                columns.append(column_of[name])
                values.append(n / counter[""])
    shares = sp.csr_matrix((values, (rows, columns)), shape=(len(counts), len(names)))
    shares.sort_indices()
    scores = ranking.separation(shares, near)
    scores.data[shares.data < MIN_SHARE] = 0  # in the same cells
    return Separation(names, scores).without_fragments(counts)


def fitting(counts: Counts, ngrams: Sequence[str]) -> sp.csr_matrix:
    """Share of each cluster's texts that hold each of V n-grams, (k, V)."""
    column_of = {name: column for column, name in enumerate(ngrams)}
    cells = [
        (row, column_of[name], n / counter[""])
        for row, counter in enumerate(counts)
        for name, n in counter.items()
        if name in column_of
    ]
    rows, columns, values = zip(*cells, strict=True) if cells else ((), (), ())
    return sp.csr_matrix((values, (rows, columns)), shape=(len(counts), len(ngrams)), dtype=float)


def _fragments(found: dict[str, float], counter: Counter[str]) -> set[str]:
    """The n-grams that occur almost only inside a longer n-gram of the same cluster."""
    fragments = set()
    for long in found:
        for part in _parts(long):
            if part in found and counter[long] >= FRAGMENT * counter[part]:
                fragments.add(part)
    return fragments


def _parts(ngram: str) -> set[str]:
    """The shorter n-grams that an n-gram contains."""
    words = ngram.split(" ")
    if len(words) == 1:
        return set(_pieces(ngram)) - {ngram} if tokenization.SPACELESS.match(ngram) else set()
    return {" ".join(phrase) for phrase in tokenization.phrases(tuple(words))} - {ngram}
