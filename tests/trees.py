"""Cuts of a tree of merges, for the tests of what is computed from one."""

from pipeline.mcr2.tree import Merge


def cut_tree(merges: list[Merge], leaves: int, k: int) -> list[int]:
    """Cluster of each leaf when k clusters are left: (leaves,) numbers in [0, k), by first leaf.

    Cuts of one tree are nested: every cluster of a smaller k is a union of clusters of a larger.
    """
    parent = list(range(leaves))
    for merge in merges[: leaves - k]:
        parent[merge.merged] = merge.kept
    for leaf in range(leaves):  # kept < merged, so a parent is final before its children
        parent[leaf] = parent[parent[leaf]]
    names = {group: name for name, group in enumerate(sorted(set(parent)))}
    return [names[group] for group in parent]
