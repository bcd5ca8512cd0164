"""How good the clusters are, in one table with the simple ways to cluster the same features.

    python -m benchmarks.accuracy [--only table synthetic …] [--sets cifar10-test,clothing] …

Sections, each with its bars: `table` (features of the sets, all samples, k given, by one encoder
and by two), `synthetic` (unions of subspaces in a narrow cone), `confidence`, `outliers`. Our runs
have the product's defaults; true labels are read for scores only. A row of the table takes one to
three minutes per seed on one core; features are kept in --cache.
"""

import argparse
import tempfile
import warnings
from collections.abc import Sequence
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
from benchmarks.features import EFFICIENTNET, MODEL, Images, Source
from benchmarks.published import Words
from pipeline.evaluate import metrics
from pipeline.mcr2 import assignment, choose_k, coding_rate, cut, spectral
from pipeline.mcr2.threads import one_thread
from pipeline.mcr2.views import View
from pipeline.select_k import settings as select_k_settings

SETS = {
    "cifar10-test": ("label",),
    "cifar100-test": ("superlabel", "label"),
    "noto-emoji": ("label", "sublabel"),
    "clothing": ("label",),
}
ENCODERS = (
    ("pico-clip",),
    ("pico-clip", "pico-resnet"),
    (EFFICIENTNET,),
    (EFFICIENTNET, "pico-resnet"),
)
BELOW = 0.5  # points below the best other column that are allowed
LEAD = 4  # points of ACC above the best k-means of the first encoder that half of the rows have
FACTOR = 1.5  # between the chosen k and the classes, on K_SETS
K_SETS = ("cifar10-test", "clothing")
ABOVE = 20  # points above k-means, where that fails: the bar of the synthetic sets
FEW = 2  # seeds of the slower sections
RESTARTS, NEIGHBOURS = 10, 20
OUTLIERS = 0.05  # share of a mixture
CASES = (  # subspaces, their dimension, dimensions of the space, noise relative to the subspace
    *((10, 5, 64, noise) for noise in (0.25, 0.5, 0.75, 1.0, 1.25)),
    *((20, 3, 128, noise) for noise in (0.5, 1.0)),
)
SAMPLES = 500  # of a subspace
SEPARATED = 99  # points of the 20-NN classifier
UNEVEN = (5000, 300, 200, 150, 100, 60, 40, 20, 10, 5)  # samples of subspaces: 1000 : 1
SETTINGS = {  # of the published recipe; those of its authors for the number of classes
    10: published.Setting(eta=0.175, epochs=5),
    20: published.Setting(eta=0.13, epochs=15),
}


@dataclass(frozen=True)
class Ours:
    """A network of the product and what it makes of its samples."""

    z: Tensor  # (N, d), all of them landmarks
    views: list[View]
    looks: list[dict[str, Any]]  # the validations
    seed: int

    @classmethod
    def of(
        cls, x: Tensor, words: Words, seed: int, dims: Sequence[int] = (), recipe: str = "auto"
    ) -> "Ours":
        """Trained on x (N, D) float16."""
        state, views = published.trained(x, words, seed, dims, recipe)
        z = state.best().eval().features(x)
        return cls(z, views, state.validations, seed)

    def cut(self, k: int) -> assignment.Assignment:
        """k clusters."""
        with one_thread():
            return assignment.assign(self.z, cut.cut(self.z, k, self.seed), 3)

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

    def kept(self) -> int:
        """The step of the network that was kept; 0: the input views."""
        return int([look for look in self.looks if look["kept"]][-1]["step"])


def centred(x: Tensor) -> Tensor:
    """Rows less their mean, of unit length."""
    return normalize(x.float() - x.float().mean(0), dim=1)


def kmeans(x: Tensor, k: int, seed: int) -> np.ndarray:
    """The best inertia of RESTARTS."""
    with one_thread():
        return spectral.kmeans(x.float().numpy(), k, RESTARTS, seed)


def knn_accuracy(x: Tensor, truth: np.ndarray) -> float:
    """Points of a leave-one-out classifier by NEIGHBOURS votes; it sees the labels."""
    index = spectral.neighbours(x.float(), NEIGHBOURS)
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
    band = f"band {choice.k_low} to {choice.k_high}"
    return f"k chosen {choice.k}, fewest bits at {choice.k_best}, {band}"


def bar(what: str, met: bool) -> None:
    """One line of judgement."""
    print(f"  {'met    ' if met else 'NOT met'}  {what}", flush=True)


COLUMNS = (
    "k-means, raw",
    "k-means, centred",
    "k-means, our views",
    "spectral, SNN graph",
    "base",
    "published recipe",
    "ours",
)


def table(source: Source) -> None:
    """Every set with every choice of encoders, k given; ACC / NMI / ARI, means over seeds."""
    leads = []
    for name in source.sets:
        for models in ENCODERS:
            found = source.images(name, models)
            words = source.words if models[0] == MODEL else Words(torch.zeros(0, 1), 1.0)
            runs = [Ours.of(found.x, words, seed, found.dims) for seed in range(source.seeds)]
            bases = [
                Ours.of(found.x, words, seed, found.dims, "none") for seed in range(source.seeds)
            ]
            print(f"\n{name}, {' + '.join(models)}")
            for view in runs[0].views[1:]:
                print(f"  {view.name}: agreement {view.agreement:.2f}, weight {view.weight:.2f}")
            print(f"  kept: {', '.join(f'step {run.kept()}' for run in runs)} (0: the base)")
            chosen = [run.choice() for run in runs[:FEW]]
            print(f"  {'; '.join(map(describe, chosen))}", flush=True)
            for label in SETS[name]:
                leads.append(row(found, found.truth(label), label, runs, bases))
            if name in K_SETS and models == (MODEL,):
                classes = found.truth(SETS[name][0]).max() + 1
                close = all(1 / FACTOR <= each.k / classes <= FACTOR for each in chosen)
                bar(f"k within a factor of {FACTOR} of {classes}", bool(close))
    some = sum(lead >= LEAD for lead in leads)
    bar(f"{some} of {len(leads)} rows lead k-means by {LEAD} points", 2 * some >= len(leads))


def row(found: Images, truth: np.ndarray, label: str, runs: list[Ours], bases: list[Ours]) -> float:
    """Print the columns of a row and its bar; returns the lead over k-means of one encoder."""
    k, first = int(truth.max() + 1), found.x[:, : found.dims[0]]
    columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for run, base in zip(runs, bases, strict=True):
        labels = {
            "k-means, raw": kmeans(first, k, run.seed),
            "k-means, centred": kmeans(centred(first), k, run.seed),
            "k-means, our views": kmeans(base.z, k, run.seed),
            "spectral, SNN graph": published.spectral_cut(base.z, k, run.seed),
            "base": base.cut(k).cluster,
            "ours": run.cut(k).cluster,
        }
        if run.seed < FEW and len(found.dims) == 1 and k in SETTINGS:
            z = published.codes(first, SETTINGS[k], run.seed)
            labels["published recipe"] = published.spectral_cut(z, k, run.seed)
        for name, own in labels.items():
            columns[name].append(points(truth, own))
    print(f"  {label}, k = {k}; 20-NN of the first encoder {knn_accuracy(first, truth):.1f}")
    columns = {name: scores for name, scores in columns.items() if scores}
    for name, scores in columns.items():
        print(f"    {name:20} {spread(scores)}", flush=True)
    means = {name: np.mean(scores, axis=0)[:2] for name, scores in columns.items()}
    behind = np.max([m for n, m in means.items() if n != "ours"], axis=0) - means["ours"]
    bar(f"behind the best other column by {behind[0]:.1f} / {behind[1]:.1f}", max(behind) <= BELOW)
    return float(means["ours"][0] - max(means[n][0] for n in COLUMNS[:2]))


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


SECTIONS = {
    "table": table,
    "synthetic": synthetic,
    "confidence": confidence,
    "outliers": outliers,
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
