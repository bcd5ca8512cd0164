"""The tables CANDIDATES and CAPTIONS, and which clusters are neighbours.

V candidates, D dimensions, k clusters.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from pipeline.artifacts import layout, schemas
from pipeline.caption import ranking
from pipeline.mcr2 import assignment
from pipeline.store import tables


@dataclass(frozen=True)
class Candidates:
    """All candidates of a run."""

    names: list[str]
    texts: np.ndarray  # (V, D) float32, unit rows
    by_texts: sp.csr_matrix  # (k, V) their separation by alt texts

    def only(self, kept: np.ndarray) -> "Candidates":
        """The candidates with these indices."""
        names = [self.names[i] for i in kept.tolist()]
        return Candidates(names, self.texts[kept], self.by_texts[:, kept])


def rows(names: list[str], vocabulary: int, texts: np.ndarray, by_texts: sp.csr_matrix) -> pa.Table:
    """CANDIDATES. The first `vocabulary` names are of a vocabulary, the others are n-grams.

    texts (V, D), by_texts (k, V).
    """
    columns = by_texts.tocsc()
    columns.sort_indices()
    ends = pa.array(columns.indptr, pa.int32())
    sources = ["vocabulary"] * vocabulary + ["alt text"] * (len(names) - vocabulary)
    made = [
        pa.array(names, pa.string()),
        pa.array(sources, pa.string()),
        tables.from_matrix(texts),
        pa.ListArray.from_arrays(ends, pa.array(columns.indices, pa.int32())),
        pa.ListArray.from_arrays(ends, pa.array(columns.data, pa.float32())),
    ]
    return pa.table(made, schema=schemas.candidates_schema(texts.shape[1]))


def level_rows(
    level: int, sure: sp.csr_matrix, names: list[list[int]], found: pa.Table
) -> list[dict[str, Any]]:
    """Rows of LEVEL_CAPTIONS: the names of the clusters of a level, counted from 0."""
    words, sources = found["caption"].to_pylist(), found["source"].to_pylist()
    return [
        {"level": level + 1, "cluster_id": number, "share": 0.0}
        | (_caption(number, parts, sure, words, sources) if parts else {})
        for number, parts in enumerate(names)
    ]


def _caption(
    number: int, parts: list[int], sure: sp.csr_matrix, words: list[str], sources: list[str]
) -> dict[str, Any]:
    """A caption of one or two words; its share and its source are those of the first."""
    caption = ranking.AND.join(words[index] for index in parts)
    return {
        "caption": caption,
        "share": float(sure[number, parts[0]]),
        "source": sources[parts[0]],
    }


def ranking_of(
    sure: sp.csr_matrix, places: list[list[int]], names: list[list[int]], found: pa.Table
) -> pa.Table:
    """CAPTIONS. `places` holds for each cluster the rows of CANDIDATES, best first.

    sure (k, V) has the shares; `names` holds the one or two rows that are the name, its caption of
    rank 0. The share of two words is that of the first.
    """
    words, sources = found["caption"].to_pylist(), found["source"].to_pylist()
    rows = []
    for number, (chosen, name) in enumerate(zip(places, names, strict=True)):
        ranked = [name, *([index] for index in chosen if index not in name)] if name else []
        for rank, parts in enumerate(ranked):
            place = {"cluster_id": number, "rank": rank}
            rows.append(place | _caption(number, parts, sure, words, sources))
    return pa.Table.from_pylist(rows, schema=schemas.CAPTIONS)


def numbered(ranked: pa.Table, k: int) -> pa.Table:
    """CAPTIONS of k clusters, with "cluster 3" for each that has no caption."""
    named = set(ranked["cluster_id"].to_pylist())
    rows = [
        {"cluster_id": number, "rank": 0, "caption": f"cluster {number}", "share": 0.0}
        | {"source": "number"}
        for number in range(k)
        if number not in named
    ]
    return pa.concat_tables([ranked, pa.Table.from_pylist(rows, schema=schemas.CAPTIONS)])


def read(paths: layout.RunPaths, k: int) -> Candidates:
    """The candidates that the stage caption wrote, for k clusters."""
    found = tables.read(paths.captions.file("candidates.parquet")).combine_chunks()
    texts = tables.to_matrix(found["vector"]).astype(np.float32)
    texts /= np.maximum(np.linalg.norm(texts, axis=1, keepdims=True), 1e-12)
    clusters, scores = found["clusters"].combine_chunks(), found["text_scores"].combine_chunks()
    cells = scores.flatten().to_numpy(), clusters.flatten().to_numpy()
    ends = np.concatenate([[0], np.cumsum(clusters.value_lengths().to_numpy())])
    by_texts = sp.csc_matrix((cells[0].astype(float), cells[1], ends), shape=(k, len(texts)))
    return Candidates(found["caption"].to_pylist(), texts, by_texts.tocsr())


def neighbourhood(paths: layout.RunPaths) -> sp.csr_matrix:
    """`ranking.neighbourhood` (k, k) of the clusters that are nearest by their prototypes."""
    found = tables.read(paths.clusters.file("prototypes.parquet"))
    return near(tables.to_matrix(found["vector"]), found["cluster_id"].to_numpy())


def near(vectors: np.ndarray, clusters: np.ndarray) -> sp.csr_matrix:
    """The same of clusters (p,) by vectors (p, d), unit rows."""
    order = np.argsort(clusters, kind="stable")
    nearest = assignment.nearest_clusters(vectors[order], clusters[order], ranking.NEIGHBOURS)
    return ranking.neighbourhood(nearest)
