"""Draw the pictures of docs/method.md from a finished run: python -m tools.make_pictures --root RUN

Each is drawn for light and for dark pages, into docs/pictures/. The bundled shards with
jobs/configs/demo.toml (`make demo`) made those that are committed.
"""

import argparse
import base64
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap

from pipeline.artifacts import layout
from pipeline.store import tables
from tools import drawing

OUT = Path(__file__).parents[1] / "docs" / "pictures"
SHOWN = 240  # rows and columns of a heat map
CLUSTERS = 8  # the largest, of which a heat map shows as many samples each


def main() -> None:
    """Read the run, draw all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="demo-run")
    paths = layout.RunPaths(parser.parse_args().root)
    clusters, network = paths.clusters.manifest(), paths.network.manifest()
    curve = tables.read(paths.clusters.file("curve.parquet"))
    draw("coding-length", drawing.coding_length, curve, clusters)
    draw("looks", drawing.looks, network["looks"])
    draw("sizes", drawing.sizes, clusters["sizes"])
    before, after, labels = landmarks(paths)
    shown = some_of_each(labels)
    draw("cosines-before", heat, np.abs(before[shown] @ before[shown].T), labels[shown])
    draw("cosines-after", heat, np.abs(after[shown] @ after[shown].T), labels[shown])


def draw(name: str, picture: drawing.Drawing, *content: object) -> None:
    """Write one figure for both grounds."""
    for theme, uri in drawing.themed(picture, *content)._asdict().items():
        data = base64.b64decode(uri.partition(",")[2])
        (OUT / f"{name}-{theme}.svg").write_bytes(data)


def landmarks(paths: layout.RunPaths) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unit rows of the landmarks before and after the network, and their clusters."""
    sample = tables.read(paths.network.file("sample.parquet"))
    parts = [pq.read_table(p) for p in sorted(Path(paths.assignments.url).glob("*.parquet"))]
    cluster = {r["sample_id"]: r["cluster_id"] for part in parts for r in part.to_pylist()}
    labels = np.array([cluster[i] for i in sample["sample_id"].to_pylist()])
    embedding = tables.to_matrix(sample["embedding"]).astype(np.float32)
    centred = embedding - embedding.mean(0)
    return *(unit(x) for x in (centred, tables.to_matrix(sample["feature"]))), labels


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length one."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def some_of_each(labels: np.ndarray) -> np.ndarray:
    """Places of as many samples of each of the largest clusters, cluster by cluster."""
    each = SHOWN // CLUSTERS
    return np.concatenate([np.flatnonzero(labels == c)[:each] for c in range(CLUSTERS)])


def heat(axes: Axes, ink: drawing.Ink, cosines: np.ndarray, labels: np.ndarray) -> None:
    """|cosines| of samples that are sorted by cluster; lines between the clusters."""
    ground = "#ffffff00"
    colours = LinearSegmentedColormap.from_list("ink", [ground, ink.lines[0]])
    axes.imshow(cosines, cmap=colours, vmin=0, vmax=1, interpolation="nearest", aspect="equal")
    for place in np.flatnonzero(np.diff(labels)) + 0.5:
        axes.axhline(place, color=ink.grid, linewidth=0.5)
        axes.axvline(place, color=ink.grid, linewidth=0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(f"{len(labels)} pictures of the {CLUSTERS} largest clusters")


if __name__ == "__main__":
    main()
