"""Rank candidates: votes of the members, separation from neighbours, no redundancy. Name clusters.

n members, D dimensions, k clusters, V candidates. Arrays in, arrays out.
"""

import math
from collections.abc import Sequence, Set
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from pipeline.caption import tokenization

TOP_VOTES = 5  # candidates that a member votes for
BATCH_ROWS = 1024  # members whose votes are counted at once: memory is this × V
NEIGHBOURS = 5  # clusters that a caption must distinguish its own cluster from
RANKED = 10  # captions kept per cluster
POOL = 50  # best candidates of a cluster, among which the RANKED are chosen
LEAST = 0.1  # of the best score; less is noise, which novelty alone would let in
RELEVANCE = 0.7  # λ of the maximal marginal relevance; the rest is novelty
UNSURE = 0.1  # of its score remains for a candidate that fits other clusters as well
WEAK = 0.5  # a caption with a smaller share is no name alone: the two best words are the name
AND = " / "  # between the two words of a name


@dataclass(frozen=True)
class Votes:
    """What the members of each cluster say about each candidate."""

    total: sp.csr_matrix  # (k, V) summed probabilities
    fits: sp.csr_matrix  # (k, V) members that have the candidate among their nearest √V

    @classmethod
    def none(cls, k: int, candidates: int) -> "Votes":
        """No votes."""
        return cls(*(sp.csr_matrix((k, candidates)) for _ in range(2)))

    def __add__(self, other: "Votes") -> "Votes":
        return Votes(self.total + other.total, self.fits + other.fits)

    def merged(self, clusters: np.ndarray) -> "Votes":
        """The votes of unions: row i is added to row clusters[i]."""
        unite = sp.csr_matrix((np.ones(len(clusters)), (clusters, np.arange(len(clusters)))))
        return Votes((unite @ self.total).tocsr(), (unite @ self.fits).tocsr())


def votes(
    x: np.ndarray, clusters: np.ndarray, texts: np.ndarray, k: int, temperature: float
) -> Votes:
    """Votes of members x (n, D) in `clusters` (n,) for texts (V, D); rows are unit.

    A member gives its TOP_VOTES largest softmax probabilities over all candidates (CPP, Chu et al.
    2024). Its √V nearest candidates fit it.
    """
    found, shape = Votes.none(k, len(texts)), (k, len(texts))
    candidates, near = torch.from_numpy(texts), math.isqrt(len(texts))
    most = min(max(TOP_VOTES, near), len(texts))
    for start in range(0, len(x), BATCH_ROWS):
        batch = slice(start, start + BATCH_ROWS)
        logits = torch.from_numpy(x[batch].astype(np.float32)) @ candidates.T / temperature
        top = logits.topk(most, dim=1).indices
        given = torch.softmax(logits, dim=1).gather(1, top).double().numpy()
        own, best = clusters[batch], top.numpy()
        voted, fits = best[:, :TOP_VOTES], best[:, :near]
        found += Votes(
            _summed(given[:, :TOP_VOTES], own, voted, shape),
            _summed(np.ones(fits.shape), own, fits, shape),
        )
    return found


def _summed(
    values: np.ndarray, own: np.ndarray, columns: np.ndarray, shape: tuple[int, int]
) -> sp.csr_matrix:
    """Sums of values (n, q) by the clusters `own` (n,) and the columns (n, q)."""
    rows = np.repeat(own, columns.shape[1])
    return sp.csr_matrix((values.ravel(), (rows, columns.ravel())), shape=shape)


def neighbourhood(nearest: Sequence[Sequence[int]]) -> sp.csr_matrix:
    """(k, k): 1 where the column is one of the row's nearest clusters, else 0."""
    sizes = [len(near) for near in nearest]
    columns = np.concatenate([np.asarray(near, np.int64) for near in nearest])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    return sp.csr_matrix((np.ones(len(columns)), columns, ends), shape=(len(sizes),) * 2)


def separation(shares: sp.csr_matrix, near: sp.csr_matrix) -> sp.csr_matrix:
    """How well each candidate distinguishes each cluster, 0 to 1; `shares`, result (k, V).

    Class-based tf-idf, share × log(1 + k / sum of shares) as in BERTopic's c-TF-IDF (Grootendorst
    2022), over log(1 + k); times the share of this cluster in those of it and its neighbours,
    which is the precision of the candidate where they are all of one size (differential cluster
    labelling, Manning et al. 2008, 17.7). 1: every member here has it, and none elsewhere.
    """
    k = shares.shape[0]
    shares = shares.tocsr(copy=True)
    shares.eliminate_zeros()
    shares.sort_indices()
    spread = np.asarray(shares.sum(axis=0)).ravel()
    around = (shares + near @ shares).multiply(shares > 0).tocsr()  # cells where shares has them
    around.sort_indices()
    rarity = np.log1p(k / np.maximum(spread, 1e-12)) / np.log1p(k)
    precision = shares.data / around.data
    scores = shares.data * rarity[shares.indices] * precision
    return sp.csr_matrix((scores, shares.indices, shares.indptr), shape=shares.shape)


def fitting(found: Votes) -> sp.csr_matrix:
    """Share of the members that each candidate fits, (k, V)."""
    per_member = max(math.isqrt(found.fits.shape[1]), 1)
    sizes = np.asarray(found.fits.sum(axis=1)).ravel() / per_member
    return (sp.diags(1 / np.maximum(sizes, 1)) @ found.fits).tocsr()


def shares(fit: sp.csr_matrix) -> sp.csr_matrix:
    """How sure a candidate is as a name, 0 to 1: (k, V) of the shares of `fitting` (k, V).

    The share of the members that it fits, less its mean share in the other clusters, as in
    Youden's index of a test (1950). A word that fits everything says nothing.
    """
    sure = fit.copy()
    others = np.asarray(fit.sum(axis=0)).ravel()[fit.indices] - fit.data
    sure.data = np.maximum(fit.data - others / max(fit.shape[0] - 1, 1), 0)
    return sure


def combine(found: Votes, texts: sp.csr_matrix, near: sp.csr_matrix) -> sp.csr_matrix:
    """Scores (k, V): separation by votes and by alt texts, added, weighted by squared `shares`.

    `texts` (k, V) is the separation by alt texts. A candidate wins where both agree. Of words that
    the pictures do not tell apart ("facing right", or "animal" among clothes), UNSURE remains.
    """
    sure = shares(fitting(found))
    whole = np.maximum(np.asarray(found.total.sum(axis=1)).ravel(), 1e-12)
    scores = separation(sp.diags(1 / whole) @ found.total, near) + texts
    return _weighted(scores, sure)


def by_texts_alone(texts: sp.csr_matrix, fit: sp.csr_matrix) -> sp.csr_matrix:
    """Scores (k, V) as of `combine` where no encoder compares texts with images.

    `texts` (k, V) is the separation by alt texts, `fit` (k, V) the share of those that hold a word.
    """
    return _weighted(texts, shares(fit))


def _weighted(scores: sp.csr_matrix, sure: sp.csr_matrix) -> sp.csr_matrix:
    return (UNSURE * scores + (1 - UNSURE) * scores.multiply(sure.power(2))).tocsr()


def best(scores: sp.csr_matrix) -> list[int | None]:
    """The candidate with the largest score of each cluster; None where no score is above 0."""
    return [next(iter(_order(scores, row).tolist()), None) for row in range(scores.shape[0])]


def rank(
    scores: sp.csr_matrix, keys: Sequence[tokenization.Key], texts: np.ndarray
) -> list[list[int]]:
    """Up to RANKED candidates of each cluster, best first, no two of which say the same.

    The POOL candidates with the best scores are selected by maximal marginal relevance (Carbonell
    and Goldstein 1998): RELEVANCE × relevance − (1 − RELEVANCE) × the largest cosine to a selected
    one. Relevance is the score over the cluster's largest score; it must be LEAST or more. The mean
    of all text vectors (V, D) is subtracted first, since every text shares it. A candidate whose
    words contain, or are contained in, those of a selected one is skipped (singular = plural).
    """
    mean = (texts.sum(axis=0, dtype=np.float64) / max(len(texts), 1)).astype(np.float32)
    found = []
    for row in range(scores.shape[0]):
        pool = _order(scores, row)[:POOL]
        worth = np.asarray(scores[row].todense()).ravel()[pool]
        taken = _diverse(worth, [keys[i] for i in pool], texts[pool] - mean)
        found.append([int(pool[i]) for i in taken])
    return found


def _order(scores: sp.csr_matrix, row: int) -> np.ndarray:
    """Candidates of one cluster with a score above 0, the largest first; ties in their order."""
    cells = slice(scores.indptr[row], scores.indptr[row + 1])
    columns, values = scores.indices[cells], scores.data[cells]
    return columns[np.lexsort((columns, -values))][: int((values > 0).sum())]


def _diverse(worth: np.ndarray, keys: list[tokenization.Key], vectors: np.ndarray) -> list[int]:
    """Positions in a pool that is sorted by `worth`, by maximal marginal relevance."""
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    relevance = worth / max(worth.max(initial=0), 1e-12)
    nearest = np.full(len(worth), 0.0)  # largest cosine to one that was taken
    left, taken = np.flatnonzero(relevance >= LEAST).tolist(), list[int]()
    while left and len(taken) < RANKED:
        gain = RELEVANCE * relevance[left] - (1 - RELEVANCE) * nearest[left]
        chosen = left[int(gain.argmax())]
        taken.append(chosen)
        nearest = np.maximum(nearest, unit @ unit[chosen])
        left = [i for i in left if i != chosen and not _nested(keys[i], keys[chosen])]
    return taken


def _nested(one: tokenization.Key, other: tokenization.Key) -> bool:
    return tokenization.holds(one, other) or tokenization.holds(other, one)


Name = frozenset[tokenization.Key]  # the one or two words of a name


def name(
    scores: sp.csr_matrix,
    fit: sp.csr_matrix,
    places: list[list[int]],
    keys: Sequence[tokenization.Key],
    others: Sequence[Set[Name]] = (),
) -> list[list[int]]:
    """The one or two candidates that name each cluster; no two clusters have the same name.

    scores and fit (`fitting`) (k, V); `places` as `rank` returns them. The cluster with the largest
    score comes first. It is named by its best candidate. If its share is WEAK, or it names an
    earlier cluster, the second word is the candidate with the largest score × share × fit that
    makes a new name. A cluster gets a name that exists only if it has no further candidates.
    `others` are names that each cluster must not have: of its parts, or of what it is a part of.
    """
    found: list[list[int]] = [chosen[:1] for chosen in places]
    sure, taken = shares(fit), set[Name]()
    first = [scores[row, chosen[0]] if chosen else 0.0 for row, chosen in enumerate(places)]
    for row in np.argsort(-np.array(first), kind="stable").tolist():
        if not (chosen := places[row]):
            continue
        first_word, *rest = chosen
        rest.sort(key=lambda i: -scores[row, i] * sure[row, i] * fit[row, i])
        pairs = [[first_word, other] for other in rest]
        alone = [[first_word]]
        tried = pairs + alone if sure[row, first_word] < WEAK else alone + pairs
        names = ((words, frozenset(keys[i] for i in words)) for words in tried)
        not_these = taken | others[row] if others else taken
        found[row], key = next(
            (n for n in names if n[1] not in not_these), (tried[-1], frozenset())
        )
        taken.add(key)
    return found
