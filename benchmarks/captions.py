"""Quality of captions: ours, ours from images alone, and the plain top-5 vote of CPP.

    python -m benchmarks.captions --data ../shared/data --out /tmp/captions

One run of the command line for each set (k given, pico-clip, one seed), then caption again without
alt texts. Only `caption_quality.py` reads the labels; it explains the columns.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import caption_quality
from pipeline.artifacts import layout
from pipeline.cli import main as cli

SETS = {  # set -> json field of the classes, their number
    "cifar10-test": ("label", 10),
    "cifar100-test": ("label", 100),
    "noto-emoji": ("label", 10),
}
VARIANTS = {"pictures and alt texts": 20, "pictures alone": 0}  # caption.alt_texts


def command(*arguments: str, **settings: Any) -> None:
    """`ratecluster` with settings; raises where it fails."""
    sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    if cli.invoke([*arguments, *sets]):
        raise RuntimeError(f"ratecluster {arguments[0]} failed")


def measure(data: Path, out: Path, name: str) -> dict[str, Any]:
    """The scores of the captions of a set, for each of VARIANTS."""
    field, k = SETS[name]
    root, found = str(out / name), {}
    command(
        "run",
        "--shards",
        str(data / name),
        "--root",
        root,
        **{"select_k.k": k, "write.shards": "false"},
    )
    for title, alt_texts in VARIANTS.items():
        command("caption", "--root", root, **{"caption.alt_texts": alt_texts})
        found[title] = caption_quality.score_run(layout.RunPaths(root), field)
    return found


def print_scores(name: str, found: dict[str, Any]) -> None:
    """Print one line for each ranking, with class names left in and removed."""
    for title, result in found.items():
        removed = f"{result['class_names']} of {result['candidates']} candidates hold a class name"
        print(f"{name}, {title}: {removed}")
        for row in result["rows"]:
            same, path, text = (
                "-" if row[key] is None else f"{100 * row[key]:.1f}"
                for key in ("accuracy", "path_similarity", "text_similarity")
            )
            names = f"{row['name']:17} names {row['class_names']:8}"
            known = f"({row['path_known']} of {row['clusters']})"
            print(f"  {names}  same {same:>5}  WordNet {path:>5} {known}  text {text:>5}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of the sets")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--only", choices=SETS, action="append", help="sets")
    arguments = parser.parse_args()
    for name in arguments.only or SETS:
        print_scores(name, measure(arguments.data, arguments.out, name))


if __name__ == "__main__":
    main()
