"""What `ratecluster plan` estimates and what `ratecluster run` then takes, side by side.

    python -m benchmarks.plan --shards SHARDS [SHARDS ...] [--set SECTION.KEY=VALUE ...]

Both on this machine, the one after the other. Wall time by stage is that of the manifests; report
is the rest of the command's. The constants of `pipeline/ops/plan/stage.py` are fitted to the
bundled emoji.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.artifacts import layout
from pipeline.artifacts.stages import chain


def command(*arguments: str) -> list[str]:
    """`ratecluster` with this interpreter."""
    return [sys.executable, "-c", "from pipeline.cli.main import main; main()", *arguments]


def real(arguments: list[str], root: str) -> dict[str, float]:
    """Run it; wall seconds by stage and of the whole."""
    began = time.monotonic()
    subprocess.run(
        command("run", "--root", root, *arguments), check=True, stdout=subprocess.DEVNULL
    )
    whole, paths = time.monotonic() - began, layout.RunPaths(root)
    seconds = {stage.name: paths.folder(stage.folder).manifest()["seconds"] for stage in chain()}
    return {**seconds, "report": whole - sum(seconds.values()), "whole": whole}


def compare(name: str, planned: float, found: float, unit: str) -> None:
    """One line."""
    ratio = planned / found if found else float("nan")
    print(f"  {name:<26} {planned:>10.2f} {found:>10.2f} {unit:<3} {ratio:>6.2f}", flush=True)


def main() -> None:
    """Plan, run, compare, for every set of shards."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shards", nargs="+", default=["examples/noto-emoji"])
    parser.add_argument("--set", dest="sets", action="append", default=[])
    options = parser.parse_args()
    for shards in options.shards:
        arguments = ["--shards", shards, *(part for s in options.sets for part in ("--set", s))]
        print(f"{shards}: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", flush=True)
        began = time.monotonic()
        done = subprocess.run(
            command("plan", *arguments, "--json"), check=True, stdout=subprocess.PIPE, text=True
        )
        plan, took = json.loads(done.stdout), time.monotonic() - began
        print(
            f"  the plan took {took:.0f} s, load now {os.getloadavg()[0]:.1f}; {plan['notes'][0]}",
            flush=True,
        )
        with tempfile.TemporaryDirectory() as root:
            seconds = real(arguments, root)
            folders = {f: layout.RunPaths(root).folder(f) for f in plan["bytes_out"]}
            sizes = {
                name: sum(Path(folder.file(file)).stat().st_size for file in folder.names())
                for name, folder in folders.items()
            }
            images = layout.RunPaths(root).embeddings.manifest()["samples"]
        print(f"  {'':<26} {'planned':>10} {'real':>10}     ratio; load {os.getloadavg()[0]:.1f}")
        compare("images", plan["images"], images, "")
        for stage in plan["stages"]:
            parts = f"{stage['stage']}, {stage['start_s']:.1f} + {stage['work_s']:.1f}"
            planned = stage["start_s"] + stage["work_s"]
            compare(parts, planned, seconds[stage["stage"]], "s")
        compare("wall time, whole", plan["wall_s"], seconds["whole"], "s")
        compare("out", sum(plan["bytes_out"].values()) / 1e6, sum(sizes.values()) / 1e6, "MB")


if __name__ == "__main__":
    main()
