"""Command evaluate: how well the clusters agree with true classes, next to k-means.

reads   embeddings/{stem}.parquet   the true class in `json`; the embeddings, for k-means
        assignments/{stem}.parquet  the clusters and their confidence
        captions/                   the names of the clusters, if there are any
writes  evaluation.json             scores over all labelled samples, majority class per cluster,
                                    classes against clusters, accuracy by confidence

Ground truth is read here only. n labelled samples, D dimensions.
"""

import json
import logging
import math
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.cluster import KMeans, MiniBatchKMeans

from pipeline.artifacts import layout, outputs
from pipeline.artifacts.joins import read_joined
from pipeline.evaluate import confusion, metrics
from pipeline.evaluate.score_tables import text as text  # the command prints it
from pipeline.evaluate.settings import CLS, Config, _no_label, expected, find_label
from pipeline.runtime import config, console
from pipeline.store import columns, storage, tables

log = logging.getLogger(__name__)
READERS = 8  # parts read at once
MAX_KMEANS = 200_000  # samples; above, mini-batch k-means is used
BATCH_ROWS = 10_240  # of a mini-batch
RESTARTS = 10  # of k-means; the one with the smallest inertia is kept
SEED = 0  # of k-means
Captions = dict[int, str]  # cluster -> its best caption


@dataclass(frozen=True)
class Labelled:
    """The samples that have a true class."""

    truth: np.ndarray  # (n,) str
    clusters: np.ndarray  # (n,) int
    confidence: np.ndarray  # (n,) float32
    embeddings: np.ndarray  # (n, D) float32; (n, 0) where they were not asked for
    unlabelled: int  # embedded samples without a true class


def label(text: str | None, field: str) -> str | None:
    """The true class in a sample's json; None if there is none.

    Of a list the first is taken. Objects and NaN are ignored.
    """
    value = columns.parse(text).get(field)
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, float):  # from tools that write floats where some values are missing
        value = int(value) if value.is_integer() else None if math.isnan(value) else value
    return str(value) if isinstance(value, (str, int, float)) else None


def read_part(stem: str, field: str, with_embeddings: bool, paths: layout.RunPaths) -> Labelled:
    """The labelled samples of one shard."""
    more = ["embedding"] if with_embeddings else []
    rows = read_joined(stem, paths, ["json", "cls", *more], ["cluster_id", "confidence"])
    found = [label(text, field) for text in rows["json"].to_pylist()]
    if field == CLS and CLS in rows.column_names:
        own = rows[CLS].to_pylist()
        found = [value or of_file for value, of_file in zip(found, own, strict=True)]
    truth = np.array(found, dtype=object)
    keep = np.array([value is not None for value in truth], dtype=bool)
    x = tables.to_matrix(rows["embedding"]) if with_embeddings else np.zeros((len(keep), 0))
    clusters, sure = (rows[name].to_numpy()[keep] for name in ("cluster_id", "confidence"))
    return Labelled(truth[keep], clusters, sure, x[keep].astype(np.float32), int((~keep).sum()))


def read_all(
    stems: list[str], field: str, with_embeddings: bool, paths: layout.RunPaths
) -> Labelled:
    """The labelled samples of the run, in the order of the shards."""
    with ThreadPoolExecutor(READERS) as pool:
        parts = list(pool.map(lambda stem: read_part(stem, field, with_embeddings, paths), stems))
    return Labelled(
        np.concatenate([part.truth for part in parts]),
        np.concatenate([part.clusters for part in parts]),
        np.concatenate([part.confidence for part in parts]),
        np.concatenate([part.embeddings for part in parts]),
        sum(part.unlabelled for part in parts),
    )


def centre(x: np.ndarray) -> np.ndarray:
    """Rows minus their mean, with unit norm: CLIP's embeddings share one large direction."""
    moved = x - x.mean(axis=0)
    unit: np.ndarray = moved / np.maximum(np.linalg.norm(moved, axis=1, keepdims=True), 1e-12)
    return unit


def kmeans(x: np.ndarray, k: int) -> np.ndarray:
    """Clusters (n,) of x (n, D) by k-means."""
    settings = {"n_clusters": k, "n_init": RESTARTS, "random_state": SEED}
    if len(x) > MAX_KMEANS:
        found = MiniBatchKMeans(batch_size=BATCH_ROWS, **settings).fit_predict(x)
    else:
        found = KMeans(**settings).fit_predict(x)
    return np.asarray(found)


def baselines(samples: Labelled, ks: list[int]) -> list[dict[str, Any]]:
    """Scores of k-means for each k, on the embeddings as they are and centred."""
    name = "mini-batch k-means" if len(samples.truth) > MAX_KMEANS else "k-means"
    features = {name: samples.embeddings, f"{name}, centred features": centre(samples.embeddings)}
    return [row(title, k, samples.truth, kmeans(x, k)) for k in ks for title, x in features.items()]


def row(name: str, k: int, truth: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    """One line of the comparison."""
    found = metrics.scores(truth, predicted)
    return {"name": name, "k": k, **{key: round(value, 6) for key, value in found.items()}}


def majorities(samples: Labelled, sizes: list[int], captions: Captions) -> list[dict[str, Any]]:
    """The most frequent true class of each cluster, and its share of the labelled members."""
    counts: list[Counter[str]] = [Counter() for _ in sizes]
    for cluster, truth in zip(samples.clusters.tolist(), samples.truth.tolist(), strict=True):
        counts[cluster][truth] += 1
    rows = []
    for cluster, (size, counted) in enumerate(zip(sizes, counts, strict=True)):
        name, count = min(counted.items(), key=lambda item: (-item[1], item[0]), default=(None, 0))
        share = round(count / counted.total(), 6) if name is not None else None
        facts = {"cluster_id": cluster, "size": size, "caption": captions.get(cluster)}
        rows.append({**facts, "majority": name, "share": share})
    return rows


def run(cfg: Config, paths: layout.RunPaths) -> dict[str, Any]:
    """Score the run's clusters and the baselines; write evaluation.json and return it.

    Raises UserError if no sample has a true class.
    """
    started = time.monotonic()
    made = outputs.upstream(paths, "clusters")
    embedded, clustered = made["embeddings"], made["clusters"]
    captioned = paths.captions.peek()
    want = expected(cfg, made | ({"captions": captioned} if captioned else {}), paths)
    if before := want.if_done():
        return before
    field = find_label(cfg, paths)
    stems = [shard["shard"]["stem"] for shard in embedded["shards"]]
    samples = read_all(stems, field, cfg.baseline, paths)
    if not len(samples.truth):
        raise _no_label(field, embedded)
    captions = _best_captions(paths) if captioned else {}
    result = {"fingerprint": want.made_of, "clustering": clustered["fingerprint"], "label": field}
    result["config"] = config.facts(cfg)
    result |= compare(samples, clustered["sizes"], captions, cfg)
    data = json.dumps(result, indent=1, sort_keys=True).encode()
    storage.write_bytes(paths.evaluation_json, data)
    paths.top.sweep()
    console.log_finished(
        *(log, "evaluate", time.monotonic() - started, f"{len(samples.truth):,} samples"),
        *(f"{result['classes']:,} classes", f"{samples.unlabelled:,} unlabelled"),
    )
    return result


def compare(samples: Labelled, sizes: list[int], captions: Captions, cfg: Config) -> dict[str, Any]:
    """All comparisons; k-means uses the run's k, then the true number of classes."""
    n, k, classes = len(samples.truth), len(sizes), len(set(samples.truth.tolist()))
    rows = [row("ratecluster", k, samples.truth, samples.clusters)]
    if cfg.baseline:
        ks = dict.fromkeys((min(k, n), classes))
        rows += baselines(samples, list(ks))
    method = "MiniBatchKMeans" if n > MAX_KMEANS else "KMeans"
    return {
        "samples": n,
        "unlabelled": samples.unlabelled,
        "classes": classes,
        "k": k,
        "baseline": f"{method}, best of {RESTARTS}" if cfg.baseline else None,
        "rows": rows,
        "clusters": majorities(samples, sizes, captions),
        "confusion": confusion.counts(samples.truth, samples.clusters),
        "by_confidence": confusion.by_confidence(
            samples.truth, samples.clusters, samples.confidence
        ),
    }


def _best_captions(paths: layout.RunPaths) -> Captions:
    rows = tables.read(paths.captions.file("captions.parquet")).to_pylist()
    return {row["cluster_id"]: row["caption"] for row in rows if row["rank"] == 0}
