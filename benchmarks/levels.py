"""Levels beside direct cuts into as many clusters, by true labels.

    python -m benchmarks.levels [--sets cifar100-test,noto-emoji] [--data DIR] [--cache DIR]

For every set the base of pico-clip and words, k as given below, and all levels of the clusters. NMI
to each label is printed beside that of a cut that knows nothing of the chosen clusters. True labels
are read for scores only.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks import published
from benchmarks.accuracy import SETS
from benchmarks.features import MODEL, Source
from pipeline.evaluate import metrics
from pipeline.mcr2 import coding_rate, cut, levels, tree
from pipeline.mcr2.threads import one_thread

CLUSTERS = {"cifar10-test": 13, "cifar100-test": 20, "noto-emoji": 19, "clothing": 7}
EPS_SQ, MOST = 0.1, 2000  # as select_k has them


def nmi(truth: np.ndarray, labels: np.ndarray) -> float:
    """In points."""
    return 100 * float(metrics.scores(truth, labels)["nmi"])


def compare(source: Source, name: str) -> None:
    """All levels of one set."""
    found = source.images(name, (MODEL,))
    state, _ = published.trained(found.x, source.words, 0, found.dims, "none")
    z = state.best().eval().features(found.x)
    with one_thread():
        index = cut.neighbours(z)
        prototypes = cut.cut(z, CLUSTERS[name], 0, index)
        began = time.perf_counter()
        marks = levels.Landmarks.of(z, prototypes, index)
        groups = levels.split(marks, MOST, 0)
        own = groups.nearest(z, marks.clusters)
        sizes = torch.bincount(own, minlength=len(groups.table)).double()
        merges = tree.grow(*coding_rate.statistics(z, marks.clusters, groups.k), EPS_SQ)
        every = levels.find(marks, groups, merges, sizes, EPS_SQ)
        took = time.perf_counter() - began
    print(f"\n{name}: {len(z):,} samples, {len(sizes)} groups, levels in {took:.1f} s")
    for level in every:
        labels = level[own.numpy()]
        k = int(level.max()) + 1
        with one_thread():
            direct = cut.cut(z, k, 0, index).nearest(z).numpy()
        least = np.bincount(labels).min()
        line = f"  {k:4} clusters, the smallest of {least:4}"
        for label in SETS[name]:
            truth = found.truth(label)
            line += f"; {label}: {nmi(truth, labels):.1f}, directly {nmi(truth, direct):.1f}"
        print(line, flush=True)


def main() -> None:
    """Every set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sets", type=lambda names: names.split(","), default=list(CLUSTERS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, help="folder for features; none: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        source = Source(options.data, options.cache or Path(temporary), options.sets, 1)
        for name in options.sets:
            compare(source, name)


if __name__ == "__main__":
    main()
