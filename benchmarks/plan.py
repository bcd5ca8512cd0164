"""What `ratecluster plan` says, and what `ratecluster run` then takes, side by side.

    python -m benchmarks.plan --shards SHARDS [SHARDS ...] [--set SECTION.KEY=VALUE ...]

Both on this machine, the one after the other. Wall time by stage is that of the manifests; report
is the rest of the command's. Memory is the largest resident set of any process of a kind, looked at
ten times a second. The constants of `pipeline/capacity.py` are fitted to the bundled emoji.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.artifacts import layout

EVERY_S = 0.1
KINDS = {  # what Ray calls its processes -> as the plan does
    "Embedder": "embed encoder",
    "TrainWorker": "train trainer",
    "count_ngrams": "caption task",
    "votes": "caption task",
    "write_shards": "write task",
}
FOLDERS = {
    "embed": "embeddings",
    "train": "network",
    "select_k": "clusters",
    "caption": "captions",
    "write": "labels",
}


def command(*arguments: str) -> list[str]:
    """`ratecluster` with this interpreter."""
    return [sys.executable, "-c", "from pipeline.cli.main import main; main()", *arguments]


class Watch:
    """Peak memory by kind of process, and processor seconds of all."""

    def __init__(self, pid: int) -> None:
        self.process, self.peaks = psutil.Process(pid), dict[str, int]()
        self.spent: dict[psutil.Process, float] = {}
        self.known: list[psutil.Process] = []

    def look(self, number: int) -> None:
        """Every so often new processes are looked for, too."""
        if number % 10 == 0:
            self.known = [self.process, *self.process.children(recursive=True)]
        for each in self.known:
            with suppress(psutil.Error, IndexError):
                title = " ".join(each.cmdline()) if each is not self.process else "driver"
                kind = next((k for part, k in KINDS.items() if part in title), None)
                kind = "select_k driver" if title == "driver" else kind
                if kind:
                    self.peaks[kind] = max(self.peaks.get(kind, 0), each.memory_info().rss)
                if number % 5 == 0:
                    times = each.cpu_times()
                    self.spent[each] = times.user + times.system


def real(arguments: list[str], root: str) -> tuple[dict[str, float], Watch]:
    """Run it; seconds by stage and of the whole."""
    began, number = time.monotonic(), 0
    with subprocess.Popen(
        command("run", "--root", root, *arguments), stdout=subprocess.DEVNULL
    ) as child:
        watch = Watch(child.pid)
        while child.poll() is None:
            watch.look(number)
            number += 1
            time.sleep(EVERY_S)
    if child.returncode:
        raise SystemExit(f"run failed with {child.returncode}")
    whole = time.monotonic() - began
    paths = layout.RunPaths(root)
    seconds = {stage: paths.folder(name).manifest()["seconds"] for stage, name in FOLDERS.items()}
    return {**seconds, "report": whole - sum(seconds.values()), "whole": whole}, watch


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
            seconds, watch = real(arguments, root)
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
        for stage in plan["stages"]:
            kind = f"{stage['stage']} {stage['process']['name']}" if stage["process"] else ""
            if kind in watch.peaks:
                compare(kind, stage["process"]["bytes"] / 1e9, watch.peaks[kind] / 1e9, "GB")
        print(f"  processor seconds of the run: {sum(watch.spent.values()):.0f}", flush=True)


if __name__ == "__main__":
    main()
