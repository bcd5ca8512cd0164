"""Embeds and verifies many damaged copies of good shards, and counts what was lost in silence.

    python -m tests.mutants [--mutants 2000] [--seed 0]

Each copy has one to three mutations: blocks are zeroed, cut out, doubled, swapped, overwritten with
random bytes, or single bytes are changed. A sample is lost in silence if the bytes of its image are
whole in the copy, and yet it is neither a row of embeddings/ nor of rejects/, while no row names
damage of the shard. Prints the counts; exit code 1 for any loss, failure or violation.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from pipeline.artifacts import layout
from pipeline.cli import main as cli
from pipeline.store import storage, tables
from tests.store import broken_tars

BLOCK = broken_tars.BLOCK
KINDS = ("zero", "cut", "double", "swap", "overwrite", "bytes", "insert zeros")
SAMPLES = 6  # of each shard


def mutated(data: bytes, draw: random.Random) -> tuple[bytes, str]:
    """A damaged copy, and the kinds of damage."""
    copy, kinds = bytearray(data), []
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind, blocks = draw.choice(KINDS), max(1, len(copy) // BLOCK)
        start = draw.randrange(blocks) * BLOCK
        stop = min(start + draw.choice((1, 1, 2, 3, 8, 20)) * BLOCK, len(copy))
        kinds.append(kind)
        if kind == "zero":
            copy[start:stop] = bytes(stop - start)
        elif kind == "cut":
            del copy[start:stop]
        elif kind == "double":
            copy[start:start] = copy[start:stop]
        elif kind == "swap":
            other = draw.randrange(blocks) * BLOCK
            one, two = copy[start : start + BLOCK], copy[other : other + BLOCK]
            copy[start : start + len(one)], copy[other : other + len(two)] = two, one
        elif kind == "overwrite":
            copy[start:stop] = draw.randbytes(stop - start)
        elif kind == "insert zeros":
            copy[start:start] = bytes(stop - start)
        else:
            for place in range(start, min(start + 4, len(copy))):
                copy[place] = draw.randrange(256)
    return bytes(copy), " + ".join(kinds)


def make(folder: Path, count: int, seed: int) -> dict[str, tuple[bytes, str]]:
    """Write the damaged shards; stem -> bytes, kinds of damage."""
    draw, found = random.Random(seed), {}
    good = [
        broken_tars.padded(broken_tars.bare(broken_tars.members(SAMPLES * i, SAMPLES)))
        for i in range(10)
    ]
    for number in range(count):
        stem = f"{number:05d}"
        found[stem] = mutated(draw.choice(good), draw)
        (folder / f"{stem}.tar").write_bytes(found[stem][0])
    return found


def silent_losses(made: dict[str, tuple[bytes, str]], paths: layout.RunPaths) -> list[str]:
    """Samples whose images are whole and that no row names."""
    pictures = [broken_tars.picture(i) for i in range(10 * SAMPLES)]
    lost = []
    for stem, (data, kinds) in made.items():
        rejects = tables.read(paths.rejects.file(f"{stem}.parquet")).to_pylist()
        if any(row["sample_id"] is None for row in rejects):  # damage of the shard is named
            continue
        part = tables.read(
            paths.embeddings.file(f"{stem}.parquet"), ["key", "tar_offset", "tar_size"]
        )
        there = {
            data[row["tar_offset"] : row["tar_offset"] + row["tar_size"]]
            for row in part.to_pylist()
        }
        named = {row["key"] for row in rejects}
        for number, picture in enumerate(pictures):
            if picture in data and picture not in there and f"{number:05d}" not in named:
                lost.append(f"{stem} ({kinds}): {number:05d}")
    return lost


def run(folder: Path, count: int, seed: int) -> int:
    """The exit code."""
    shards = folder / "shards"
    shards.mkdir()
    made, root = make(shards, count, seed), str(folder / "run")
    codes = [
        cli.invoke(
            [
                *("embed", "--shards", str(shards), "--root", root),
                *("--set", "embed.max_reject_fraction=1"),
            ]
        ),
        cli.invoke(["verify", "--root", root]),
    ]
    paths = layout.RunPaths(root)
    if not storage.exists(paths.embeddings.file("manifest.json")):
        return 1
    lost, manifest = silent_losses(made, paths), paths.embeddings.manifest()
    kinds = Counter(kind for _, each in made.values() for kind in each.split(" + "))
    print(f"{count:,} shards, seed {seed}: {', '.join(f'{n} x {k}' for k, n in kinds.items())}")
    print(
        f"{manifest['samples']:,} samples, {manifest['embedded']:,} embedded, "
        f"{manifest['rejected']:,} rejected, {manifest['damaged']:,} shards with named damage"
    )
    print(f"lost in silence: {len(lost)}; exit codes of embed and verify: {codes}")
    print(*lost[:10], sep="\n")
    return int(bool(lost) or codes != [0, 0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(run(Path(folder), options.mutants, options.seed))


if __name__ == "__main__":
    main()
