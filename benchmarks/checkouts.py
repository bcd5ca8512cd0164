"""Speed of embed in two checkouts, one run of each after the other, and the ratio.

    python -m benchmarks.checkouts BEFORE AFTER [--shards examples/noto-emoji] [--rounds 3]

BEFORE and AFTER are clones with a virtual environment in `.venv`.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from statistics import mean


def speed(checkout: Path, shards: Path) -> float:
    """Samples per second of `ratecluster embed` there."""
    with tempfile.TemporaryDirectory() as root:
        command = [str(checkout / ".venv/bin/ratecluster"), "--quiet", "embed"]
        places = ["--shards", str(shards), "--root", root]
        subprocess.run([*command, *places], cwd=checkout, check=True, capture_output=True)
        return float(
            json.loads(Path(root, "embeddings/manifest.json").read_text())["samples_per_s"]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--shards", type=Path, default=Path("examples/noto-emoji"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    shards = options.shards.absolute()
    found: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(options.rounds):
        for name, runs in found.items():
            runs.append(speed(getattr(options, name).absolute(), shards))
    for name, runs in found.items():
        print(f"{name:6} {mean(runs):7.1f} samples/s, runs {', '.join(f'{n:.0f}' for n in runs)}")
    print(f"after / before: {mean(found['after']) / mean(found['before']):.3f}")


if __name__ == "__main__":
    main()
