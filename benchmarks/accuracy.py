"""How good the clusters are, beside k-means on the same features.

    python -m benchmarks.accuracy [--only table synthetic …] [--sets cifar10-test,noto-emoji] …

Sections, each with its bars: `table` (pico-clip features of the sets, all samples), `synthetic`
(unions of subspaces in a narrow cone), `confidence`, `outliers`, `ablation` (from the published
recipe to ours). Our runs have the product's defaults; true labels are read for scores only. A
training takes about half a minute on one core, the whole an hour; features are kept in --cache.
"""

import argparse
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import SpectralClustering
from sklearn.metrics import roc_auc_score
from sklearn.metrics.cluster import contingency_matrix
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks import published
from benchmarks.features import Images, Source
from benchmarks.published import Words
from pipeline.evaluate import metrics
from pipeline.mcr2 import assignment, coding_rate, spectral
from pipeline.mcr2.threads import one_thread
from pipeline.select_k import choose_k
from pipeline.select_k import settings as select_k_settings
from pipeline.train import loop
from pipeline.train import settings as train_settings

SETS = {
    "cifar10-test": ("label",),
    "cifar100-test": ("superlabel", "label"),
    "noto-emoji": ("label", "sublabel"),
}
RECOVERING = {
    ("cifar10-test", "label"),
    ("cifar100-test", "superlabel"),
    ("cifar100-test", "label"),
}
MARGIN, SHARE, SPREAD, CHOSEN = -0.5, 1 / 3, 1.5, (8, 14)  # bars of the table; points, but SHARE
ABOVE = 20  # points above k-means, where that fails: the bar of the synthetic sets
FEW = 2  # seeds of what stands beside the table
RESTARTS, NEIGHBOURS = 10, 20
OUTLIERS = 0.05  # share of a mixture
CASES = (  # subspaces, their dimension, dimensions of the space, noise relative to the subspace
    *((10, 5, 64, noise) for noise in (0.25, 0.5, 0.75, 1.0, 1.25)),
    *((20, 3, 128, noise) for noise in (0.5, 1.0)),
)
SAMPLES = 500  # of a subspace
SEPARATED = 99  # points of the 20-NN classifier
UNEVEN = (5000, 300, 200, 150, 100, 60, 40, 20, 10, 5)  # samples of subspaces: 1000 : 1
SETTINGS = {  # of the published recipe
    ("cifar10-test", "label"): published.Setting(eta=0.175, epochs=5),
    ("cifar100-test", "superlabel"): published.Setting(eta=0.13, epochs=15),
}


@dataclass(frozen=True)
class Ours:
    """A network of the product and what it makes of its samples."""

    z: Tensor  # (N, d), all of them landmarks
    seed: int

    @classmethod
    def of(cls, x: Tensor, words: Words, seed: int) -> "Ours":
        """Trained on x (N, D) float16."""
        return cls(published.trained(x, words, seed).best().eval().features(x), seed)

    def cut(self, k: int) -> assignment.Assignment:
        """k clusters."""
        with one_thread():
            prototypes = choose_k.cut(self.z, k, select_k_settings.Config(k=k, seed=self.seed))
            return assignment.assign(self.z, prototypes, 3)

    def choice(self) -> choose_k.Choice:
        """k as select_k chooses it."""
        cfg = select_k_settings.fit_settings(
            select_k_settings.Config(seed=self.seed), len(self.z), *self.z.shape
        )
        with one_thread():
            leaves = choose_k.over_segment(self.z, cfg)
            labels = assignment.nearest(self.z, leaves)
            stats = coding_rate.statistics(self.z, labels, len(leaves))
            return choose_k.choose_k(self.z, leaves, stats, cfg)


def centred(x: Tensor) -> Tensor:
    """Rows less their mean, of unit length."""
    return normalize(x.float() - x.float().mean(0), dim=1)


def kmeans(x: Tensor, k: int, seed: int) -> np.ndarray:
    """The best inertia of RESTARTS."""
    with one_thread():
        return spectral.kmeans(x.float().numpy(), k, RESTARTS, seed)


def worded(x: Tensor, words: Words, seed: int) -> Tensor:
    """[centred image; centred words]: what our network sees, untrained."""
    cfg = train_settings.fit_settings(train_settings.Config(seed=seed), len(x))
    return loop.new_network(cfg, x, words.table, words.scale).views(x.float())


def knn_accuracy(x: Tensor, truth: np.ndarray) -> float:
    """Points of a leave-one-out classifier by NEIGHBOURS votes; it sees the labels."""
    _, index = spectral.neighbours(x.float(), NEIGHBOURS)
    votes = np.eye(truth.max() + 1, dtype=int)[truth[index.numpy()]].sum(1)
    return 100 * float((votes.argmax(1) == truth).mean())


def points(truth: np.ndarray, found: Any) -> np.ndarray:
    """ACC, NMI, ARI in points."""
    return 100 * np.array(list(metrics.scores(truth, np.asarray(found)).values()))


def matched(truth: np.ndarray, found: Any) -> np.ndarray:
    """Which samples (N,) are in the class that their cluster is matched to."""
    counts = contingency_matrix(truth, np.asarray(found))
    classes = np.full(counts.shape[1], -1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    classes[columns] = rows
    clusters = np.unique(np.asarray(found), return_inverse=True)[1]
    return np.asarray(classes[clusters] == truth)


def spread(runs: list[np.ndarray]) -> str:
    """ACC, NMI, ARI: mean ± standard deviation over the runs."""
    mean, sd = np.mean(runs, axis=0), np.std(runs, axis=0, ddof=min(1, len(runs) - 1))
    return " / ".join(f"{m:.1f} ± {s:.1f}" for m, s in zip(mean, sd, strict=True))


def triple(scores: np.ndarray) -> str:
    """ACC/NMI/ARI of one run."""
    return "/".join(f"{score:.1f}" for score in scores)


def describe(choice: choose_k.Choice) -> str:
    """A choice of k in words."""
    return (
        f"k chosen {choice.k}, flat {choice.flat_from} to {choice.flat_to}, fewest bits at "
        f"{choice.k_best}, band {choice.k_low} to {choice.k_high}"
    )


def bar(what: str, met: bool) -> None:
    """One line of judgement."""
    print(f"  {'met    ' if met else 'NOT met'}  {what}", flush=True)


@dataclass(frozen=True)
class Row:
    """A set with one kind of label: scores of each seed."""

    ours: list[np.ndarray]
    raw: list[np.ndarray]
    centred: list[np.ndarray]

    def margins(self) -> np.ndarray:
        """Points of ACC above the better k-means of the seed."""
        return np.array([a[0] for a in self.ours]) - self.best()

    def best(self) -> np.ndarray:
        """ACC of the better k-means of each seed."""
        return np.array([max(a[0], b[0]) for a, b in zip(self.raw, self.centred, strict=True)])


def table(source: Source) -> None:
    """The sets, at the true k and at the chosen one."""
    for name in source.sets:
        print(f"\n{name}")
        found = source.images(name)
        rows: dict[str, Row] = {label: Row([], [], []) for label in SETS[name]}
        chosen = []
        for seed in range(source.seeds):
            started = time.perf_counter()
            ours = Ours.of(found.x, source.words, seed)
            choice = ours.choice()
            seconds = time.perf_counter() - started
            print(f"  seed {seed}: {describe(choice)}; trained and chosen in {seconds:.0f} s")
            chosen.append(choice.k)
            for label, row in rows.items():
                one_seed(found.x, found.truth(label), ours, row)
        for label, row in rows.items():
            summary(name, label, knn_accuracy(found.x, found.truth(label)), row)
        if name == "cifar10-test":
            low, high = CHOSEN
            bar(f"k chosen {chosen}: {low} to {high}", all(low <= k <= high for k in chosen))
        beside(source, found, SETS[name])


def one_seed(x: Tensor, truth: np.ndarray, ours: Ours, row: Row) -> None:
    """Add a seed to a row."""
    k = truth.max() + 1
    row.ours.append(points(truth, ours.cut(k).cluster))
    row.raw.append(points(truth, kmeans(x, k, ours.seed)))
    row.centred.append(points(truth, kmeans(centred(x), k, ours.seed)))
    last = [f"{name} {triple(runs[-1])}" for name, runs in vars(row).items()]
    print(f"    k = {k}: {', '.join(last)}", flush=True)


def summary(name: str, label: str, knn: float, row: Row) -> None:
    """Means over seeds, and the bars."""
    print(f"  {name} {label}, {len(row.ours)} seeds, ACC / NMI / ARI")
    for what, runs in vars(row).items():
        print(f"    {what if what == 'ours' else f'k-means, {what}':20} {spread(runs)}")
    margins, headroom = row.margins(), knn - row.best().mean()
    share = margins.mean() / headroom
    print(f"    20-NN, leave one out {knn:.1f}; headroom {headroom:.1f}, recovered {share:.0%}")
    bar(f"worst margin {margins.min():+.1f}: at least {MARGIN}", margins.min() >= MARGIN)
    if (name, label) in RECOVERING:
        bar(f"headroom recovered {share:.0%}: at least a third (goal: half)", share >= SHARE)
    if name == "cifar10-test":
        sd = np.std(row.ours, axis=0, ddof=min(1, len(row.ours) - 1))[0]
        bar(f"standard deviation of ACC {sd:.2f}: at most {SPREAD}", bool(sd <= SPREAD))


def beside(source: Source, found: Images, labels: tuple[str, ...]) -> None:
    """What of it is the words', and whether class names among them gave it away."""
    less = source.words_without(found.facts)
    seeds = range(min(FEW, source.seeds))
    nets = [Ours.of(found.x, less, seed) for seed in seeds]
    for label in labels:
        truth = found.truth(label)
        k = truth.max() + 1
        both = [points(truth, kmeans(worded(found.x, source.words, s), k, s)) for s in seeds]
        leak = [points(truth, net.cut(k).cluster) for net in nets]
        print(f"    {label}: k-means, image and words {spread(both)} ({len(both)} seeds)")
        print(
            f"    {label}: ours, no class names     {spread(leak)} ({len(leak)} seeds)", flush=True
        )


def union(
    dimension: int, space: int, sizes: tuple[int, ...], noise: float, seed: int
) -> tuple[Tensor, np.ndarray]:
    """Unit rows (N, D) float16 on random subspaces, all moved by one mean of their own length."""
    generator = np.random.default_rng(seed)
    rows = []
    for size in sizes:
        basis = np.linalg.qr(generator.normal(size=(space, dimension)))[0]
        a = generator.normal(size=(size, dimension))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        rows.append(a @ basis.T + noise * generator.normal(size=(size, space)) / space**0.5)
    mean = generator.normal(size=space)
    x = np.concatenate(rows) + mean / np.linalg.norm(mean)
    order = generator.permutation(len(x))
    truth = np.repeat(np.arange(len(sizes)), sizes)[order]
    return normalize(torch.from_numpy(x[order]), dim=1).half(), truth


def plain_spectral(x: Tensor, k: int, seed: int) -> np.ndarray:
    """scikit-learn's spectral clustering of the graph of 10 neighbours."""
    model = SpectralClustering(k, affinity="nearest_neighbors", n_neighbors=10, random_state=seed)
    with one_thread(), warnings.catch_warnings():  # of graphs in several parts
        warnings.simplefilter("ignore", UserWarning)
        return np.asarray(model.fit_predict(x.float().numpy()))


def synthetic(source: Source) -> None:
    """Unions of subspaces in a narrow cone, no words."""
    for case in CASES:
        synthetic_case(case, source.seeds)
    for seed in range(min(FEW, source.seeds)):
        uneven(seed)


def synthetic_case(case: tuple[int, int, int, float], seeds: int) -> None:
    """Means over seeds, and the bars; clusters are separated where neighbours tell them apart."""
    k, dimension, space, noise = case
    print(f"\n{k} subspaces of {dimension} dimensions in {space}, noise {noise}")
    runs, chosen, knn = [], [], []
    for seed in range(seeds):
        x, truth = union(dimension, space, (SAMPLES,) * k, noise, seed)
        ours = Ours.of(x, Words(torch.zeros(0, space), 1.0), seed)
        choice = ours.choice()
        print(f"  seed {seed}: {describe(choice)}", flush=True)
        chosen.append(choice.k)
        knn.append(knn_accuracy(x, truth))
        runs.append(synthetic_scores(x, truth, ours, choice.k))
    for name in runs[0]:
        print(f"    {name:20} {spread([run[name] for run in runs])}")
    mean = {name: float(np.mean([run[name][0] for run in runs])) for name in runs[0]}
    print(f"    20-NN, leave one out {np.mean(knn):.1f}")
    ahead = mean["ours"] - max(mean["k-means, raw"], mean["k-means, centred"])
    bar(f"{ahead:+.1f} points above k-means: at least {ABOVE}", ahead >= ABOVE)
    plain = mean["spectral, raw"]
    over = mean["ours"] - plain
    bar(f"{over:+.1f} points above plain spectral clustering, which has {plain:.1f}", over > 0)
    if min(knn) >= SEPARATED:
        bar(f"k chosen {chosen}: {k}, as clusters are separated", set(chosen) == {k})


def synthetic_scores(
    x: Tensor, truth: np.ndarray, ours: Ours, chosen: int
) -> dict[str, np.ndarray]:
    """ACC, NMI, ARI of one seed."""
    k = truth.max() + 1
    return {
        "ours": points(truth, ours.cut(k).cluster),
        "ours, k chosen": points(truth, ours.cut(chosen).cluster),
        "k-means, raw": points(truth, kmeans(x, k, ours.seed)),
        "k-means, centred": points(truth, kmeans(centred(x), k, ours.seed)),
        "spectral, raw": points(truth, plain_spectral(x, k, ours.seed)),
    }


def uneven(seed: int) -> None:
    """Recall of each of 10 subspaces of very different numbers of samples."""
    x, truth = union(5, 64, UNEVEN, 0.25, seed)
    ours = Ours.of(x, Words(torch.zeros(0, 64), 1.0), seed)
    k = len(UNEVEN)
    print(
        f"\n1000 : 1, noise 0.25, seed {seed}: recall of each subspace; {describe(ours.choice())}"
    )
    print(f"    {'samples':20} {' '.join(f'{size:5}' for size in UNEVEN)}   mean")
    for name, found in (
        ("ours", ours.cut(k).cluster),
        ("k-means, raw", kmeans(x, k, seed)),
        ("k-means, centred", kmeans(centred(x), k, seed)),
        ("spectral, raw", plain_spectral(x, k, seed)),
    ):
        right = matched(truth, found)
        recall = [100 * right[truth == c].mean() for c in range(k)]
        shown = " ".join(f"{each:5.0f}" for each in recall)
        acc = 100 * right.mean()
        print(f"    {name:20} {shown}   {np.mean(recall):4.0f}   ACC {acc:.1f}", flush=True)


def confidence(source: Source) -> None:
    """Accuracy over deciles of confidence."""
    found = source.images("cifar10-test")
    truth = found.truth("label")
    print("\ncifar10-test: accuracy and mean confidence of each tenth, the least confident first")
    for seed in range(min(FEW, source.seeds)):
        assigned = Ours.of(found.x, source.words, seed).cut(truth.max() + 1)
        right = matched(truth, assigned.cluster)
        tenths = np.array_split(np.argsort(assigned.confidence.numpy(), kind="stable"), 10)
        accuracies = [100 * right[rows].mean() for rows in tenths]
        means = [100 * float(assigned.confidence[rows].mean()) for rows in tenths]
        print(f"  seed {seed}, accuracy    {' '.join(f'{a:5.1f}' for a in accuracies)}")
        print(f"          confidence  {' '.join(f'{c:5.1f}' for c in means)}")
        bar("accuracy rises from every tenth to the next", bool((np.diff(accuracies) > 0).all()))


def outliers(source: Source) -> None:
    """Images of another set among those of cifar10-test: are they found?"""
    inside = source.images("cifar10-test").x
    for name in ("noto-emoji", "cifar100-test"):
        print(f"\ncifar10-test with {OUTLIERS:.0%} of {name}: AUROC of being from there")
        for seed in range(min(FEW, source.seeds)):
            others = source.images(name).x
            count = round(len(inside) * OUTLIERS / (1 - OUTLIERS))
            strange = np.random.default_rng(seed).choice(len(others), count, replace=False)
            x = torch.cat([inside, others[torch.from_numpy(strange)]])
            truth = np.arange(len(x)) >= len(inside)
            ours = Ours.of(x, source.words, seed).cut(10)
            scores = {
                "outlier_score": ours.outlier_score.numpy(),
                "1 − confidence": 1 - ours.confidence.numpy(),
                "k-means, raw": to_centroid(x.float(), seed),
                "k-means, centred": to_centroid(centred(x), seed),
            }
            found = [f"{what} {roc_auc_score(truth, score):.3f}" for what, score in scores.items()]
            print(f"  seed {seed}: {', '.join(found)}", flush=True)


def to_centroid(x: Tensor, seed: int) -> np.ndarray:
    """Distance (N,) to the nearest of 10 centroids of k-means."""
    labels = kmeans(x, 10, seed)
    centroids = torch.stack([x[torch.from_numpy(labels == c)].mean(0) for c in range(10)])
    return torch.cdist(x, centroids).amin(1).numpy()


def ablation(source: Source) -> None:
    """From the published recipe to ours, one change at a time."""
    for (name, label), setting in SETTINGS.items():
        if name not in source.sets:
            continue
        found = source.images(name)
        truth = found.truth(label)
        k, seeds = truth.max() + 1, range(min(FEW, source.seeds))
        print(f"\n{name} {label}, k = {k}, {len(seeds)} seeds, ACC / NMI / ARI", flush=True)
        runs = []
        for seed in seeds:
            labels = published.ablation(found.x, source.words, k, setting, seed)
            runs.append([points(truth, each) for each in labels])
            print(f"  seed {seed}: {' · '.join(map(triple, runs[-1]))}", flush=True)
        for row, scores in zip(published.ROWS, zip(*runs, strict=True), strict=True):
            print(f"    {spread(list(scores))}   {row}")


SECTIONS = {
    "table": table,
    "synthetic": synthetic,
    "confidence": confidence,
    "outliers": outliers,
    "ablation": ablation,
}


def main() -> None:
    """Print the sections asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--sets", type=lambda names: names.split(","), default=list(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--cache", type=Path, help="folder for features; none: a temporary one")
    options = parser.parse_args()
    if unknown := set(options.sets) - SETS.keys():
        parser.error(f"unknown sets {sorted(unknown)}; choose from {', '.join(SETS)}")
    with one_thread(), tempfile.TemporaryDirectory() as scratch:
        cache = options.cache or Path(scratch)
        cache.mkdir(parents=True, exist_ok=True)
        source = Source(options.data, cache, options.sets, options.seeds)
        for name in options.only:
            SECTIONS[name](source)


if __name__ == "__main__":
    main()
