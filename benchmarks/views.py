"""How much a second view helps, by its agreement with the first: where the bounds come from.

    python -m benchmarks.views

The first view are the pixels of scikit-learn's 1,797 digits. The second are features of the same
digits (gradients, Fourier magnitudes, sums, parts of the picture), noisy copies, and views that see
nothing of the digits. Prints the agreement of each (`mcr2/views.py`), and ACC / NMI of the cut into
10 for several weights of it; true labels are read for scores only. One core, about ten minutes.
"""

from collections.abc import Iterator

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import normalize

from pipeline.evaluate import metrics
from pipeline.mcr2 import cut, spectral, views
from pipeline.mcr2.threads import one_thread

WEIGHTS = (0.0, 0.15, 0.3, 0.5, 0.7, 1.0)
K = 10


def centred(x: np.ndarray) -> Tensor:
    """Rows (m, d) less their mean, of unit length, float32."""
    rows = torch.from_numpy(np.asarray(x, np.float32))
    return normalize(rows - rows.mean(0), dim=1)


def second_views(images: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Views of digits (m, 8, 8) by name."""
    m, generator = len(images), np.random.default_rng(0)
    down, right = np.gradient(images, axis=(1, 2))
    strength, angle = np.hypot(down, right), np.arctan2(down, right)
    histograms = []
    for low in np.linspace(-np.pi, np.pi, 8, endpoint=False):
        own = strength * ((angle >= low) & (angle < low + np.pi / 4))
        histograms.append(own.reshape(m, 2, 4, 2, 4).sum((2, 4)).reshape(m, -1))
    gradients = np.concatenate(histograms, axis=1)
    flat = images.reshape(m, -1)
    yield "a copy", flat
    yield "gradients", gradients
    yield "Fourier magnitudes", np.abs(np.fft.fft2(images)).reshape(m, -1)[:, 1:]
    yield "upper half", images[:, :4].reshape(m, -1)
    yield "row sums", images.sum(2)
    yield "upper left quarter", images[:, :4, :4].reshape(m, -1)
    yield "column sums", images.sum(1)
    yield "lower right corner", images[:, 5:, 5:].reshape(m, -1)
    yield "pixels and noise", flat + generator.normal(0, 12, flat.shape)
    yield (
        "mean, deviation, maximum",
        np.stack([f(images, (1, 2)) for f in (np.mean, np.std, np.max)], 1),
    )
    yield "gradients of other digits", gradients[generator.permutation(m)]
    yield "noise", generator.normal(size=flat.shape)
    blind = np.eye(10)[generator.integers(0, 10, m)] @ generator.normal(size=(10, 64))
    yield "ten groups at random", blind + 0.3 * generator.normal(size=flat.shape)


def scores(rows: Tensor, truth: np.ndarray) -> str:
    """ACC / NMI in points of the cut into K of rows (m, d), as cut.cut makes it."""
    index = cut.neighbours(rows)
    smooth = spectral.smooth(rows, spectral.shared_neighbours(index))
    found = metrics.scores(truth, spectral.partition(smooth, index, K, 0))
    acc, nmi, _ = (100 * value for value in found.values())
    return f"{acc:.1f}/{nmi:.1f}"


def main() -> None:
    """Print the table."""
    data = load_digits()
    first, truth = centred(data.data), data.target
    print(
        f"{'second view':28} agreement  weight  at it      " + "  ".join(f"{w:9}" for w in WEIGHTS)
    )
    with one_thread():
        for name, view in second_views(data.images):
            second = centred(view)
            agreement = views.agreements([first, second], 0)[1]
            weight = views.weight(agreement)
            at = {
                w: scores(centred(torch.cat([first, w * second], 1).numpy()), truth)
                for w in (weight, *WEIGHTS)
            }
            row = "  ".join(f"{at[w]:9}" for w in WEIGHTS)
            print(f"{name:28} {agreement:9.2f}  {weight:6.2f}  {at[weight]:9}  {row}", flush=True)


if __name__ == "__main__":
    main()
