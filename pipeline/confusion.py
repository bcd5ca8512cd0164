"""Where clusters and true classes disagree: counts of both, and how often the sure are right.

n labelled samples; truth (n,) of names, clusters (n,) of numbers. What is returned goes into
evaluation.json and stays small whatever n and the numbers of classes and clusters.
"""

from typing import Any

import numpy as np

CLASSES, CLUSTERS = 40, 60  # in the picture at most, the largest
GROUPS = 10  # of samples, by confidence


def counts(truth: np.ndarray, clusters: np.ndarray) -> dict[str, Any]:
    """Samples of each class in each cluster: of the CLASSES and CLUSTERS with most of them.

    Classes by size, clusters by their commonest class, so that agreement is a diagonal. `shown` of
    the samples are in it.
    """
    names, class_of = np.unique(truth.astype(str), return_inverse=True)
    ids, cluster_of = np.unique(clusters, return_inverse=True)
    whole = np.zeros((len(names), len(ids)), dtype=np.int64)
    np.add.at(whole, (class_of.ravel(), cluster_of.ravel()), 1)
    rows = np.argsort(-whole.sum(axis=1), kind="stable")[:CLASSES]
    columns = np.argsort(-whole.sum(axis=0), kind="stable")[:CLUSTERS]
    columns = columns[np.argsort(whole[rows][:, columns].argmax(axis=0), kind="stable")]
    part = whole[rows][:, columns]
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
    names, class_of = np.unique(truth.astype(str), return_inverse=True)
    ids, cluster_of = np.unique(clusters, return_inverse=True)
    whole = np.zeros((len(ids), len(names)), dtype=np.int64)
    np.add.at(whole, (cluster_of.ravel(), class_of.ravel()), 1)
    right = whole.argmax(axis=1)[cluster_of.ravel()] == class_of.ravel()
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
