"""How well clusters agree with true classes: accuracy by matching, NMI and ARI. Reads no files.

Labels are arrays (n,) of integers or strings; only which samples share a label
matters, not its name. There may be more clusters than classes, or fewer.
"""

from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix


def accuracy(truth: Any, predicted: Any) -> float:
    """Share of samples whose class is the one that their cluster is matched to, 0 to 1.

    The matching is one-to-one and optimal (Hungarian method). If there are more clusters than
    classes, the samples of unmatched clusters count as wrong.
    """
    counts = contingency_matrix(*_encoded(truth, predicted))  # (classes, clusters)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / counts.sum())


def nmi(truth: Any, predicted: Any) -> float:
    """Mutual information divided by the arithmetic mean of both entropies, 0 to 1."""
    return float(normalized_mutual_info_score(*_encoded(truth, predicted)))


def ari(truth: Any, predicted: Any) -> float:
    """Rand index adjusted for chance: 1 is perfect, 0 is chance, negative is worse than chance."""
    return float(adjusted_rand_score(*_encoded(truth, predicted)))


def scores(truth: Any, predicted: Any) -> dict[str, float]:
    """All three, as fractions of 1."""
    truth, predicted = _encoded(truth, predicted)
    return {
        "acc": accuracy(truth, predicted),
        "nmi": nmi(truth, predicted),
        "ari": ari(truth, predicted),
    }


def _encoded(truth: Any, predicted: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as integers; ValueError if they are empty or differ in length."""
    if len(truth) != len(predicted) or not len(truth):
        raise ValueError(
            f"{len(truth)} true labels and {len(predicted)} predicted ones: give one of each for "
            "every sample, and at least one sample"
        )
    codes = [np.unique(np.asarray(labels), return_inverse=True)[1] for labels in (truth, predicted)]
    return codes[0].ravel(), codes[1].ravel()
