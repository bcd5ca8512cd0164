"""CIFAR-10 or CIFAR-100 as shards, with the true classes in the json.

    python -m benchmarks.cifar --set cifar10|cifar100 --split test --out DIR [--data-dir DIR]

torchvision downloads the set to CACHE, or reads an extracted one from --data-dir. Images are PNG,
the json fields are those of `ratecluster shards`, and `superlabel` for CIFAR-100.
"""

import argparse
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.prepare import pack, settings
from pipeline.runtime.errors import UserError

NAMES = ("cifar10", "cifar100")
CACHE = Path("~/.cache/ratecluster")
SUPERLABELS = {  # of CIFAR-100; torchvision has the 100 labels only
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
    """The images of one of NAMES; UserError where they are missing or their checksums differ."""
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = Path(data_dir or CACHE).expanduser()
    try:
        data = kind(str(root), train=split == "train", download=data_dir is None)
    except (RuntimeError, OSError) as error:
        what = f"{kind.base_folder}/ in {root}"
        raise UserError(
            f"{name}: no intact {what} ({error}); extract {kind.url} there and give --data-dir"
        ) from None
    return rows(data.data, data.targets, data.classes, split)


def rows(
    pixels: np.ndarray, targets: Sequence[int], classes: Sequence[str], split: str
) -> list[Row]:
    """Rows of pixels (N, 32, 32, 3) uint8 and targets (N,), indices of `classes`."""
    above = {name: label for label, names in SUPERLABELS.items() for name in names.split()}
    with_superlabel = set(classes) == above.keys()
    found: list[Row] = []
    for i, (image, target) in enumerate(zip(pixels, targets, strict=True)):
        label = classes[target].replace("_", " ")
        source = f"{split}/{label}/{i:05d}.png"
        superlabel = above[classes[target]] if with_superlabel else None
        found.append((source, label, image, superlabel))
    return found


def sample(row: Row, key: str) -> tuple[pack.Record, pack.Members]:
    """The record and the members of one image, as `pack.write_shard` takes them."""
    source, label, pixels, superlabel = row
    png = io.BytesIO()
    Image.fromarray(pixels).save(png, "PNG")
    more = {} if superlabel is None else {"superlabel": superlabel}
    return pack.sample(key, "png", png.getvalue(), None, label=label, source=source, **more)


def write(images: Sequence[Row], out: str) -> None:
    """Shards of 1,000 shuffled images below the folder `out`."""
    for shard in pack.plan(images, settings.Config()):
        keys = (f"{shard.stem}{place:04d}" for place in range(len(shard.pictures)))
        pack.write_shard(f"{out}/{shard.stem}", map(sample, shard.pictures, keys))


def main() -> None:
    """Write the shards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--set", choices=NAMES, required=True)
    parser.add_argument("--split", choices=("train", "test"), required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--data-dir", help="folder of an extracted set; default: download it")
    options = parser.parse_args()
    write(load(options.set, options.split, options.data_dir), options.out)


if __name__ == "__main__":
    main()
