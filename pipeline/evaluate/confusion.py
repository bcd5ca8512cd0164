"""Where clusters and true classes disagree: counts of both, and how often the sure are right.

n labelled samples; truth (n,) of names, clusters (n,) of numbers. What is returned goes into
evaluation.json and stays small whatever n and the numbers of classes and clusters.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp

CLASSES, CLUSTERS = 40, 60  # in the picture at most, the largest
GROUPS = 10  # of samples, by confidence


def counts(truth: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Samples of each class in each cluster: of the CLASSES and CLUSTERS with most of them.

    Classes by size, clusters by their commonest class, so that agreement is a diagonal. `shown` of
    the samples are in it.
    """
    names, class_of = np.unique(truth.astype(str), return_inverse=True)
    ids, cluster_of = np.unique(clusters, return_inverse=True)
    rows = np.argsort(-np.bincount(class_of), kind="stable")[:CLASSES]
    columns = np.argsort(-np.bincount(cluster_of), kind="stable")[:CLUSTERS]
    part = _table(class_of, cluster_of)[rows][:, columns].toarray()
    order = np.argsort(part.argmax(axis=0), kind="stable")
    columns, part = columns[order], part[:, order]
    return {
        "classes": names[rows].tolist(),
        "clusters": ids[columns].tolist(),
        "counts": part.tolist(),
        "shown": int(part.sum()),
    }


def by_confidence(
    truth: np.ndarray, clusters: np.ndarray, confidence: np.ndarray
) -> list[dict[str, Any]]:
    """Tenths of the samples by confidence, least first: how many are of their cluster's class.

    A cluster's class is the commonest among its labelled samples, the first by name of several.
    """
    _, class_of = np.unique(truth.astype(str), return_inverse=True)
    _, cluster_of = np.unique(clusters, return_inverse=True)
    commonest = np.asarray(_table(cluster_of, class_of).argmax(axis=1)).ravel()
    right = commonest[cluster_of] == class_of
    order = np.argsort(confidence, kind="stable")
    return [
        {
            "samples": len(rows),
            "confidence": round(float(confidence[rows].mean(dtype=np.float64)), 6),
            "right": round(float(right[rows].mean()), 6),
        }
        for rows in np.array_split(order, GROUPS)
        if len(rows)
    ]


def _table(rows: np.ndarray, columns: np.ndarray) -> sp.csr_matrix:
    """How often each pair comes: sparse, since classes may be nearly as many as samples."""
    table = sp.csr_matrix((np.ones(len(rows), np.int64), (rows, columns)))
    table.sum_duplicates()
    return table
