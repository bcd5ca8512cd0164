"""CIFAR-10 or CIFAR-100 as labelled webdataset shards, read through torchvision.

    python -m benchmarks.cifar --set cifar10 --split test --out cifar10-shards

Downloads the set to ~/.cache/ratecluster unless --data-dir names a folder with an extracted one.
"""

import argparse
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import webdataset as wds
from PIL import Image

NAMES = ("cifar10", "cifar100")
CACHE = Path("~/.cache/ratecluster")
PER_SHARD = 1000  # samples
SUPERLABELS = {  # CIFAR-100's own, which torchvision leaves out
    "aquatic mammals": "beaver dolphin otter seal whale",
    "fish": "aquarium_fish flatfish ray shark trout",
    "flowers": "orchid poppy rose sunflower tulip",
    "food containers": "bottle bowl can cup plate",
    "fruit and vegetables": "apple mushroom orange pear sweet_pepper",
    "household electrical devices": "clock keyboard lamp telephone television",
    "household furniture": "bed chair couch table wardrobe",
    "insects": "bee beetle butterfly caterpillar cockroach",
    "large carnivores": "bear leopard lion tiger wolf",
    "large man-made outdoor things": "bridge castle house road skyscraper",
    "large natural outdoor scenes": "cloud forest mountain plain sea",
    "large omnivores and herbivores": "camel cattle chimpanzee elephant kangaroo",
    "medium-sized mammals": "fox porcupine possum raccoon skunk",
    "non-insect invertebrates": "crab lobster snail spider worm",
    "people": "baby boy girl man woman",
    "reptiles": "crocodile dinosaur lizard snake turtle",
    "small mammals": "hamster mouse rabbit shrew squirrel",
    "trees": "maple_tree oak_tree palm_tree pine_tree willow_tree",
    "vehicles 1": "bicycle bus motorcycle pickup_truck train",
    "vehicles 2": "lawn_mower rocket streetcar tank tractor",
}

Row = tuple[str, str, np.ndarray, str | None]  # source, label, (32, 32, 3) uint8, superlabel


def load(name: str, split: str, data_dir: str | None) -> list[Row]:
    """One of NAMES; torchvision checks the archive's checksums before it reads them."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = Path(data_dir or CACHE).expanduser()
    try:
        data = kind(str(root), train=split == "train", download=data_dir is None)
    except (RuntimeError, OSError) as error:
        what = f"{kind.base_folder}/ in {root}"
        raise SystemExit(
            f"{name}: no intact {what} ({error}); extract {kind.url} there and give --data-dir"
        ) from None
    return rows(data.data, data.targets, data.classes, split)


def rows(
    pixels: np.ndarray, targets: Sequence[int], classes: Sequence[str], split: str
) -> list[Row]:
    """Rows of CIFAR's arrays: pixels (N, 32, 32, 3) uint8, targets (N,) into `classes`."""
    above = {name: label for label, names in SUPERLABELS.items() for name in names.split()}
    with_superlabel = set(classes) == above.keys()
    found: list[Row] = []
    for i, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        label = classes[target].replace("_", " ")
        source = f"{split}/{label}/{i:05d}.png"
        superlabel = above[classes[target]] if with_superlabel else None
        found.append((source, label, image, superlabel))
    return found


def write(found: list[Row], out: Path) -> None:
    """Shards of PER_SHARD samples in a shuffled order, the same for the same rows."""
    out.mkdir(parents=True, exist_ok=True)
    order = list(found)
    random.Random(0).shuffle(order)
    for number, start in enumerate(range(0, len(order), PER_SHARD)):
        with wds.TarWriter(str(out / f"{number:05d}.tar"), encoder=False, mtime=0) as writer:
            for place, row in enumerate(order[start : start + PER_SHARD]):
                writer.write({"__key__": f"{number:05d}{place:04d}", **members(row)})


def members(row: Row) -> dict[str, bytes]:
    """The PNG and the json of a sample, by suffix."""
    source, label, pixels, superlabel = row
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    facts = {"source": source, "label": label}
    if superlabel is not None:
        facts["superlabel"] = superlabel
    return {"png": png.getvalue(), "json": json.dumps(facts).encode()}


def main() -> None:
    """Write the shards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--set", choices=NAMES, required=True)
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--out", type=Path, required=True, help="folder for the shards")
    parser.add_argument("--data-dir", help="folder with an extracted CIFAR")
    asked = parser.parse_args()
    write(load(asked.set, asked.split, asked.data_dir), asked.out)


if __name__ == "__main__":
    main()
