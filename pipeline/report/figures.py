"""The charts of the page: their numbers for ECharts, and the same in words and tables.

reads   clusters/{curve, tree, prototypes}.parquet, network/{history, sample}.parquet,
        evaluation.json for the charts that compare clusters with true classes

A chart has a `title`, a `text` below it, an `alt` text for screen readers, a `table`, and `data`,
which charts.js draws.
"""

import base64
import math
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout
from pipeline.report import geometry
from pipeline.report.run_data import Facts, RunData
from pipeline.store import tables

POINTS = 400  # the most of a line
LINES = 25  # rows of the table of a line
MERGES = 30  # rows of the table of the tree
DIGITS = 4  # after the decimal point

Chart = dict[str, Any]


def thin(count: int, most: int) -> np.ndarray:
    """At most `most` of `count` indices, evenly spaced, with the first and the last."""
    found: np.ndarray = np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
    return found


def _round(values: Any, digits: int = DIGITS) -> Any:
    return [None if v is None or math.isnan(v) else round(float(v), digits) for v in values]


def coding_length(run: RunData, curve: pa.Table) -> Chart:
    """Bits per sample for every k (CURVE), the chosen k, and the flat region."""
    chosen, samples = run.clustered, max(1, run.clustered["samples"])
    k = curve["k"].to_numpy()
    bits, low, high = (curve[n].to_numpy() / samples for n in ("bits", "low", "high"))
    shown = np.unique([*thin(len(k), POINTS), min(chosen["k"], len(k)) - 1])
    listed = np.unique([*thin(len(k), LINES), min(chosen["k"], len(k)) - 1])
    names = ("k", "k_best", "k_low", "k_high", "flat_from", "flat_to")
    flat = f"With {chosen['flat_from']:,} to {chosen['flat_to']:,} clusters the bits are at most "
    flat += "0.5 % of the saving above the minimum. k has the best mean rank in bits, "
    flat += "modularity, stability and silhouette, unless it is set."
    return {
        "title": "Coding length",
        "text": f"The minimum is at {chosen['k_best']:,} clusters, and in 90 % of the resamples at "
        f"{chosen['k_low']:,} to {chosen['k_high']:,}. {flat}",
        "alt": f"Bits per sample for 1 to {len(k):,} clusters, with a band of 90 % of the "
        f"resamples. Chosen: {chosen['k']:,} clusters, {bits[min(chosen['k'], len(k)) - 1]:.1f} "
        f"bits per sample; one cluster takes {bits[0]:.1f}.",
        "table": {
            "head": ["Clusters", "Bits per sample", "5 % of resamples below", "95 % below"],
            "rows": [[f"{k[i]:,}", *(f"{v[i]:.2f}" for v in (bits, low, high))] for i in listed],
        },
        "data": {
            **{name: chosen[name] for name in names},
            "ks": k[shown].tolist(),
            "bits": _round(bits[shown], 3),
            "low": _round(low[shown], 3),
            "high": _round(high[shown], 3),
        },
    }


def tree(run: RunData, merges: pa.Table, clusters: list[Facts]) -> Chart:
    """The merges of the chosen clusters (TREE), and the bits of each union:

    L(A ∪ B) = L(A) + L(B) − saved − [name(A ∪ B) − name(A) − name(B)], see mcr2/tree.py.
    """
    sizes, bits = list(run.clustered["sizes"]), list(run.clustered["cluster_bits"])
    names = {row["id"]: row["caption"] or "(no caption)" for row in clusters}
    total, rows = max(1, sum(sizes)), []

    def name_bits(count: int) -> float:
        return -count * math.log2(max(1, count) / total)

    for merge in merges.to_pylist():
        a, b = merge["kept"], merge["merged"]
        named = name_bits(sizes[a] + sizes[b]) - name_bits(sizes[a]) - name_bits(sizes[b])
        bits[a] += bits[b] - merge["bits_saved"] - named
        sizes[a] += sizes[b]
        rows.append([merge["k"], a, b, round(bits[a], 1), round(-merge["bits_saved"], 1)])
    last = rows[-MERGES:]
    listed = [[f"{k:,}", names[a], names[b], f"{lost:,.0f}"] for k, a, b, _, lost in last]
    return {
        "title": "Cluster tree",
        "text": "Each step merges the two clusters that lose the fewest bits. The dashed line is "
        "the cut that the slider sets; each dot is one cluster at this cut.",
        "alt": f"Tree of {len(sizes):,} clusters, merged pair by pair until one is left.",
        "table": {"head": ["Clusters left", "Cluster", "merged with", "Bits lost"], "rows": listed},
        "data": rows,
    }


def cluster_map(vectors: pa.Table, clusters: list[Facts]) -> Chart:
    """Positions of the clusters in two dimensions, by number."""
    table, cluster_of = tables.to_matrix(vectors["vector"]), vectors["cluster_id"].to_numpy()
    places, share = geometry.plane(geometry.similarity(table, cluster_of))
    return {
        "title": "Map of the clusters",
        "text": "Clusters with similar features are close; areas show numbers of samples. "
        "Classical multidimensional scaling of the cosines between prototypes: these two "
        f"dimensions show {100 * share:.0f} % of the variation.",
        "alt": f"{len(clusters):,} clusters in two dimensions. The table of clusters lists "
        "the nearest clusters of each.",
        "table": None,
        "data": [_round(place) for place in places],
    }


def landmarks(vectors: pa.Table, paths: layout.RunPaths) -> geometry.Landmarks:
    """The sample that train kept, before and after the network."""
    sample = tables.read(paths.network.file("sample.parquet"), ["embedding", "feature"])
    x, z = (tables.to_matrix(sample[n]).astype(np.float32) for n in ("embedding", "feature"))
    table, cluster_of = tables.to_matrix(vectors["vector"]), vectors["cluster_id"].to_numpy()
    return geometry.Landmarks(x, z, geometry.nearest(z, table, cluster_of))


def heat(kept: geometry.Landmarks) -> Chart:
    """|cosines| between landmarks, sorted by cluster, before and after training."""
    rows = geometry.heat_rows(kept.cluster)
    cluster = kept.cluster[rows]
    data: dict[str, Any] = {"clusters": cluster.tolist()}
    means = []
    for when, x in (("before", kept.embedding), ("after", kept.feature)):
        percent = geometry.heat(x[rows])
        data[when] = base64.b64encode(percent.tobytes()).decode()
        means.append([f"{mean:.2f}" for mean in geometry.contrast(percent, cluster)])
    shown, of = len(set(cluster.tolist())), len(set(kept.cluster.tolist()))
    largest = f", of the {shown:,} largest clusters" if shown < of else ""
    words = [f"{within} within a cluster, {between} between" for within, between in means]
    return {
        "title": "Similarity of samples, |ZᵀZ|",
        "text": f"{len(rows):,} samples{largest}, sorted by cluster. Mean |cosine| before "
        f"training: {words[0]}; after: {words[1]}. Clear blocks along the diagonal mean "
        "well separated clusters.",
        "alt": f"Heat map of the cosines between {len(rows):,} samples sorted by cluster",
        "table": {
            "head": ["Mean |cosine|", "within a cluster", "between clusters"],
            "rows": [["before training", *means[0]], ["after", *means[1]]],
        },
        "data": data,
    }


def spectra(kept: geometry.Landmarks, clusters: list[Facts]) -> Chart:
    """Normalised singular values of landmarks, overall and per cluster, before and after."""
    names = {str(row["id"]): row["caption"] or "(no caption)" for row in clusters}
    found = {
        "before": geometry.spectra(kept.embedding, kept.cluster),
        "after": geometry.spectra(kept.feature, kept.cluster),
    }
    rows = []
    for c in found["before"]:
        halves = [int((found[when][c] >= 0.5).sum()) for when in found]
        tens = [int((found[when][c] >= 0.1).sum()) for when in found]
        rows.append([names.get(c, "all samples"), *halves, *tens])
    return {
        "title": "Singular values",
        "text": "Relative to the largest; thick: all samples, thin: the largest clusters. Training "
        "should spread all samples over many directions, but each cluster over few.",
        "alt": "Normalised singular values of all samples and of the largest clusters",
        "table": {
            "head": [
                "Singular values of",
                "≥ ½ of the largest, before",
                "after",
                "≥ a tenth, before",
                "after",
            ],
            "rows": rows,
        },
        "data": {
            when: {c: _round(values, 3) for c, values in lines.items()}
            for when, lines in found.items()
        },
    }


def training(history: pa.Table) -> Chart:
    """Expansion, compression and loss of every step (HISTORY)."""
    shown = thin(history.num_rows, POINTS)
    names = ("expansion", "compression", "loss")
    columns = {name: history[name].to_numpy()[shown] for name in names}
    step = history["step"].to_numpy()[shown]
    listed = thin(len(step), LINES)
    return {
        "title": "Rates and loss",
        "text": "Training maximises R − R_c: the rate of all features minus that of the clusters.",
        "alt": f"Expansion, compression and loss over {history.num_rows:,} steps",
        "table": {
            "head": ["Step", "R, nats", "R_c, nats", "Loss"],
            "rows": [[f"{step[i]:,}", *(f"{columns[n][i]:.3f}" for n in names)] for i in listed],
        },
        "data": {"step": step.tolist(), **{n: _round(v) for n, v in columns.items()}},
    }


def validations(run: RunData) -> Chart:
    """Neighbour information at every validation of the network, which kept the best one."""
    found, kept = run.trained["looks"], run.trained["kept_step"]
    return {
        "title": "Validation",
        "text": (f"The network of step {kept:,} is kept. " if kept else "No network is kept. ")
        + "A network is kept where the cluster of a sample says at least 2 % more about the "
        "clusters of its neighbours than before training, in nearly all resamples.",
        "alt": f"Neighbour information at {len(found)} steps",
        "table": {
            "head": ["Step", "Neighbour information, nats"],
            "rows": [[f"{one['step']:,}", f"{one['information']:.4f}"] for one in found],
        },
        "data": {
            "kept": kept,
            "step": [one["step"] for one in found],
            "information": _round(one["information"] for one in found),
        },
    }


def confusion(evaluation: Facts, clusters: list[Facts]) -> Chart:
    """Classes against clusters."""
    found = evaluation["confusion"]
    names = {row["id"]: row["caption"] or "(no caption)" for row in clusters}
    head = ["Class", *(f"{c} {names[c]}" for c in found["clusters"])]
    rows = [
        [name, *(f"{n:,}" if n else "" for n in counts)]
        for name, counts in zip(found["classes"], found["counts"], strict=True)
    ]
    left = evaluation["samples"] - found["shown"]
    others = f" {left:,} samples of smaller classes and clusters are not shown." if left else ""
    return {
        "title": "Classes against clusters",
        "text": "The colour shows the share of a class in a cluster. Clusters are sorted by their "
        f"most common class.{others}",
        "alt": f"Heat map of {len(rows):,} true classes against {len(head) - 1:,} clusters",
        "table": {"head": head, "rows": rows},
        "data": {key: found[key] for key in ("classes", "clusters", "counts")},
    }


def confidence(evaluation: Facts) -> Chart:
    """Accuracy by confidence."""
    tenths = evaluation["by_confidence"]
    first, last = (f"{100 * tenths[i]['right']:.0f} %" for i in (0, -1))
    return {
        "title": "Accuracy by confidence",
        "text": "Tenths of the samples, by confidence. A sample is right if it has the most "
        f"common class of its cluster: {first} of the least confident tenth, {last} of the most.",
        "alt": f"Bars of the accuracy of each tenth, from {first} to {last}",
        "table": {
            "head": ["Tenth", "Samples", "Mean confidence", "Right"],
            "rows": [
                [i, f"{t['samples']:,}", f"{t['confidence']:.3f}", f"{100 * t['right']:.1f} %"]
                for i, t in enumerate(tenths, start=1)
            ],
        },
        "data": tenths,
    }
