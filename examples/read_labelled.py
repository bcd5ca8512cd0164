"""Reads labelled shards with webdataset: the images, and what ratecluster says of them.

python examples/read_labelled.py 'my-run/labeled/*.tar' --samples 5
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset as wds


def read(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Key and label of every sample, in the order of the shards; the label is in its json."""
    dataset = wds.WebDataset(sorted(map(str, folder.glob("*.tar"))), shardshuffle=False)
    for sample in dataset:  # bytes by suffix: jpg, json, txt …
        yield sample["__key__"], json.loads(sample["json"])["ratecluster"]


def main() -> None:
    """Print one line per sample."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="with labelled shards")
    parser.add_argument("--samples", type=int, default=10, help="to print")
    asked = parser.parse_args()
    for _, (key, label) in zip(range(asked.samples), read(asked.folder), strict=False):
        if label["status"] == "success":
            print(f"{key}  {label['cluster_caption']}  {label['confidence']:.2f}")
        else:
            print(f"{key}  {label['status']}: {label['error_message']}")


if __name__ == "__main__":
    main()
