"""Files of given embeddings: Parquet with two columns of vectors, and clip-retrieval's layout."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NAMES = ("red fox", "blue car", "green tree", "old house")
DIMS = (32, 16)  # of clip and of dino


def rows(n: int, seed: int = 0, prefix: str = "k") -> tuple[np.ndarray, dict[str, pa.Array]]:
    """n samples of four clusters: vectors (n, 32) float32, and the columns of their Parquet."""
    rng = np.random.default_rng(1)
    first, second = (rng.normal(size=(len(NAMES), dim)) for dim in DIMS)
    rng = np.random.default_rng(seed + 2)
    classes = rng.integers(0, len(NAMES), n)
    x = (first[classes] + 0.3 * rng.normal(size=(n, DIMS[0]))).astype(np.float32)
    also = (second[classes] + 0.3 * rng.normal(size=(n, DIMS[1]))).astype(np.float64)
    return x, {
        "key": pa.array([f"{prefix}{i:04d}" for i in range(n)]),
        "caption": pa.array([f"a photo of a {NAMES[c]}" for c in classes]),
        "label": pa.array([NAMES[c] for c in classes]),
        "width": pa.array(range(n), pa.int64()),
        "clip": pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), DIMS[0]),
        "dino": pa.array(list(also), pa.list_(pa.float64())),
    }


def write_parquet(folder: Path, n: int = 200, files: int = 2, leave_out: tuple = ()) -> Path:
    """`files` files of n samples each, without some of the columns."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        _, columns = rows(n, number, f"{number}-")
        kept = {name: own for name, own in columns.items() if name not in leave_out}
        pq.write_table(pa.table(kept), folder / f"{number:05d}.parquet")
    return folder


def write_clip_retrieval(folder: Path, n: int = 200, files: int = 2, dtype: str = "<f2") -> Path:
    """What clip-retrieval's inference writes, with text_emb/."""
    for name in ("img_emb", "metadata", "text_emb"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(files):
        x, columns = rows(n, number, f"{number}-")
        for kind in ("img_emb", "text_emb"):
            np.save(folder / kind / f"{kind}_{number}.npy", x.astype(dtype))
        found = {"image_path": columns["key"], "caption": columns["caption"]}
        found["label"] = columns["label"]
        pq.write_table(pa.table(found), folder / "metadata" / f"metadata_{number}.parquet")
    return folder
