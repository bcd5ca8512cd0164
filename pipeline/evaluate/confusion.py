"""Where clusters and true classes disagree: their counts, and accuracy by confidence.

n labelled samples; truth (n,) of names, clusters (n,) of numbers. The results go into
evaluation.json; their size does not grow with n or the numbers of classes and clusters.
"""

from typing import Any

import numpy as np
import scipy.sparse as sp

CLASSES, CLUSTERS = 40, 60  # the largest ones are shown, at most so many
GROUPS = 10  # of samples, by confidence


def counts(truth: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Samples of each class in each cluster, for the largest CLASSES classes and CLUSTERS clusters.

    Classes are sorted by size, clusters by their most frequent class, so that agreement lies on the
    diagonal. `shown` is the number of samples counted.
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
    """Accuracy in tenths of the samples, from the least confident to the most confident.

    A sample is right if its class is the most frequent one of its cluster; ties are broken by name.
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
    """How often each pair occurs; sparse, since there may be almost as many classes as samples."""
    table = sp.csr_matrix((np.ones(len(rows), np.int64), (rows, columns)))
    table.sum_duplicates()
    return table
