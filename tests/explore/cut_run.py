"""A run up to its clusters, of vectors, clusters and scores that a test gives; no stage runs."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.artifacts import layout, schemas
from pipeline.store import tables
from tests import subspaces

DIM = 8


@dataclass
class Members:
    """Samples in the order of their parts."""

    vectors: np.ndarray  # (n, DIM) unit rows
    clusters: np.ndarray
    scores: np.ndarray
    ids: list[str] = field(default_factory=list)

    def before(self) -> tuple[np.ndarray, list[str | None]]:
        """SemDeDup by its definition: each sample's largest cosine to one before it, and which."""
        x = self.vectors.astype(np.float16).astype(np.float64)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        best, partner = np.full(len(x), -np.inf), [None] * len(x)
        order = sorted(range(len(x)), key=lambda i: (-self.scores[i], self.ids[i]))
        for place, i in enumerate(order):
            for j in order[:place]:
                if self.clusters[i] == self.clusters[j] and x[i] @ x[j] > best[i] + 1e-6:
                    best[i], partner[i] = x[i] @ x[j], self.ids[j]
        return best, partner


def members(n: int = 90, k: int = 3, seed: int = 0) -> Members:
    """Vectors so close that many cosines are over 0.8; every tenth is a copy of another."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, DIM)) * 0.35
    x[:, 0] += 1
    x[::10] = x[5::10][: len(x[::10])]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    scores = rng.integers(0, 8, n).astype(np.float32) / 10  # with ties
    clusters = rng.integers(0, k, n)
    clusters[::10] = clusters[5::10][: len(clusters[::10])]
    return Members(x, clusters, scores)


def build(root: Path, of: Members, parts: int = 3, k: int = 3) -> layout.RunPaths:
    """The run below `root`; gives the members their sample ids."""
    paths = layout.RunPaths(str(root))
    cuts = np.array_split(np.arange(len(of.vectors)), parts)
    of.ids = subspaces.write_parts(paths, [of.vectors[cut] for cut in cuts])
    subspaces.write_network(paths, of.vectors[:5], of.ids[:5])
    for number, cut in enumerate(cuts):
        rows = [
            {
                "sample_id": of.ids[i],
                "cluster_id": int(of.clusters[i]),
                "group": int(of.clusters[i]),
                "confidence": float(1 - of.scores[i]),
                "margin": 0.5,
                "outlier_score": float(of.scores[i]),
                "top_clusters": [int(of.clusters[i])],
                "top_shares": [0.5],
            }
            for i in cut
        ]
        table = pa.Table.from_pylist(rows, schema=schemas.ASSIGNMENTS)
        tables.write(paths.assignments.file(f"{number:05d}.parquet"), table)
    sizes = np.bincount(of.clusters, minlength=k).tolist()
    paths.clusters.finish(
        "clusters-1", upstream="network-1", config={"eps_sq": 0.1}, sizes=sizes, k=k
    )
    return paths


def listed(paths: layout.RunPaths, name: str) -> list[dict]:
    """All rows of a list, part after part."""
    folder = paths.folder(f"curation/{name}")
    names = sorted(n for n in folder.names() if n.endswith(".parquet") and n[0].isdigit())
    return [row for n in names for row in tables.read(folder.file(n)).to_pylist()]
