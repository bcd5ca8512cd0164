"""From many small groups to one: merge, step by step, the pair that saves most bits.

k groups, d dimensions. Only the additive statistics of the groups are used, so the cost does not
depend on the number of samples. Source: the pairwise steepest descent of Ma, Derksen, Hong, Wright,
TPAMI 2007, started from an over-segmentation instead of from single samples.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.mcr2 import coding_rate

BLOCK = 32  # pairs whose determinants are computed together: they fit a cache


@dataclass(frozen=True)
class Merge:
    """One step: group `merged` becomes part of group `kept`, which saves `bits_saved`."""

    kept: int
    merged: int
    bits_saved: float


def grow(count: Tensor, total: Tensor, gram: Tensor, eps_sq: float, near: int = 32) -> list[Merge]:
    """All k − 1 merges of k groups, each the best of its step.

    count (k,), total (k, d) sums of members, gram (k, d, d), all float64; `eps_sq` is ε².
    Candidates are the pairs of each group with its `near` nearest groups by mean direction, updated
    as groups merge, and all pairs once none is left. The smaller of the two numbers is kept.
    """
    state = _Groups(count.clone(), total.clone(), gram.clone(), eps_sq)
    merges: list[Merge] = []
    heap = state.offers(range(len(count)), near)
    while len(merges) < len(count) - 1:
        if not heap:
            heap = state.offers(sorted(state.alive), len(count))
        loss, a, b, version_a, version_b = heapq.heappop(heap)
        if (state.version[a], state.version[b]) != (version_a, version_b):
            continue
        state.merge(a, b)
        merges.append(Merge(a, b, -loss))
        for offer in state.offers([a], near):
            heapq.heappush(heap, offer)
    return merges


Offer = tuple[float, int, int, int, int]  # bits lost, a < b, and the versions of both


class _Groups:
    """The groups that are not merged yet. A changed group gets a new version."""

    def __init__(self, count: Tensor, total: Tensor, gram: Tensor, eps_sq: float) -> None:
        self.count, self.total, self.gram, self.eps_sq = count, total, gram, eps_sq
        self.samples = count.sum()
        self.bits = coding_rate.length_bits(count, gram, eps_sq)
        self.alive = set(range(len(count)))
        self.version = [0] * len(count)

    def offers(self, groups: "range | list[int]", near: int) -> list[Offer]:
        """A heap of the merges of `groups` with their nearest others."""
        pairs = sorted({(min(a, b), max(a, b)) for a in groups for b in self._nearest(a, near)})
        heap = []
        for start in range(0, len(pairs), BLOCK):
            a, b = torch.tensor(pairs[start : start + BLOCK]).T
            lost = self._bits_lost(a, b)
            for loss, i, j in zip(lost.tolist(), a.tolist(), b.tolist(), strict=True):
                heap.append((loss, i, j, self.version[i], self.version[j]))
        heapq.heapify(heap)
        return heap

    def merge(self, a: int, b: int) -> None:
        """Merge group b into group a."""
        self.count[a] += self.count[b]
        self.total[a] += self.total[b]
        self.gram[a] += self.gram[b]
        self.bits[a] = coding_rate.length_bits(self.count[a], self.gram[a], self.eps_sq)
        self.alive.remove(b)
        self.version[a] += 1
        self.version[b] = -1

    def _nearest(self, a: int, near: int) -> list[int]:
        others = torch.tensor(sorted(self.alive - {a}))
        if len(others) <= near:
            return list(others.tolist())
        means = torch.nn.functional.normalize(self.total, dim=1)
        closest = (means[others] @ means[a]).topk(near).indices
        return list(others[closest].tolist())

    def _bits_lost(self, a: Tensor, b: Tensor) -> Tensor:
        """Bits lost by merging a with b, for the codes of the members and for their names."""
        n_a, n_b = self.count[a], self.count[b]
        gram = self.gram[a].add_(self.gram[b])  # of a copy
        codes = coding_rate.length_bits(n_a + n_b, gram, self.eps_sq)
        names = coding_rate.name_bits(torch.stack([n_a + n_b, n_a, n_b]), self.samples)
        return codes - self.bits[a] - self.bits[b] + names[0] - names[1] - names[2]


def cut(merges: Sequence[Merge], groups: int, k: int) -> list[int]:
    """The cluster of each of the groups when k are left: numbers from 0, in the order of groups.

    Cuts of one tree are nested: every cluster of a smaller k is a union of clusters of a larger.
    """
    parent = list(range(groups))
    for merge in merges[: groups - k]:
        parent[merge.merged] = merge.kept
    for group in range(groups):  # kept < merged, so a parent is final before its children
        parent[group] = parent[parent[group]]
    numbers = {group: number for number, group in enumerate(sorted(set(parent)))}
    return [numbers[group] for group in parent]


def lengths_bits(merges: list[Merge], count: Tensor, gram: Tensor, eps_sq: float) -> Tensor:
    """L(X, cut) in bits of every cut of a tree, (leaves,): entry i is the cut into i + 1 clusters.

    count (leaves,) and gram (leaves, d, d) are of the leaves that `grow` had, of all samples or of
    a resample. One determinant per node, in blocks.
    """
    count, gram = count.clone(), gram.clone()
    samples = count.sum()
    bits = [
        _group_bits(count[i : i + BLOCK], gram[i : i + BLOCK], samples, eps_sq)
        for i in range(0, len(count), BLOCK)
    ]
    group = torch.cat(bits)
    total = group.sum()
    curve = [total]
    for merge in merges:
        a, b = merge.kept, merge.merged
        count[a] += count[b]
        gram[a] += gram[b]
        joined = _group_bits(count[a], gram[a], samples, eps_sq)
        total = total + joined - group[a] - group[b]
        group[a] = joined
        curve.append(total)
    return torch.stack(curve[::-1])


def _group_bits(count: Tensor, gram: Tensor, samples: Tensor, eps_sq: float) -> Tensor:
    return coding_rate.length_bits(count, gram, eps_sq) + coding_rate.name_bits(count, samples)
