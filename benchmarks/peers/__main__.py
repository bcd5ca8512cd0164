"""Images/s and memory of embed beside three other ways to embed the same shards.

    python -m benchmarks.peers --work FOLDER [--case photos small] [--rounds 3] …

    clip-retrieval    `clip-retrieval inference` of PyPI
    DataLoader loop   webdataset, torch's DataLoader and open_clip in a plain script
    Ray Data          read_webdataset, map, map_batches, write_parquet, as its guide has them
    ratecluster       `python -m jobs.embed`, all guarantees; in fp32 as the others, and as it comes

All get the same shards, weights, batch size, threads of the model and of decoding. Each runs in a
Python of its own (`--work`/venvs/NAME, made from benchmarks/peers/NAME.txt where it is not there:
some GB each), in turns.

    photos      JPEGs of 128 to 512 pixels, tiled from pictures of --source; ViT-B-32 with
                random weights
    small       the images of --small as they are; pico-clip, so small that overhead shows
    small-vit   the first of these images, as many as there are photos; ViT-B-32

Wall time is that of the whole command. `steady` leaves out what the same command takes for 16
images: starting, importing, loading the model, stopping. `ms` are milliseconds of a processor per
image, likewise: on a busy machine they say more. Memory is the peak of the sum of proportional set
sizes of all its processes (shared pages counted once). Embeddings of all images are compared with
those of ratecluster in fp32: `cosine` is the least.

Every run is added to `--work`/results.jsonl; medians of all that stands there are printed, so that
the rounds may be run one by one.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from benchmarks.mcr2.measuring import machine
from benchmarks.peers import materials
from benchmarks.peers.contenders import PEERS, Contender, Task, ours
from benchmarks.whole_run import memory

EVERY_S = 1  # summing up the pages of all processes costs their time, too
EMOJI = str(Path(__file__).parents[2] / "examples" / "noto-emoji")
CASES = ("photos", "small", "small-vit")
OURS = ours("ratecluster, fp32", precision="fp32")
CONTENDERS = [*PEERS, OURS, ours("ratecluster, auto")]


def folder_of(contender: Contender, case: str, work: Path) -> Path:
    """Where it writes."""
    return work / "out" / case / contender.name.replace(", ", "-").replace(" ", "-")


@dataclass(frozen=True)
class Cost:
    """Of a command, with all the processes it starts."""

    wall_s: float
    cpu_s: float  # of processors; a process's last moments are not seen
    peak: int  # bytes


def run(contender: Contender, task: Task, out: Path, venvs: Path) -> Cost:
    """What the command takes. Raises if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    command = [contender.python(venvs), *contender.command(task, out)]
    threads = {"OMP_NUM_THREADS": str(task.threads), "MKL_NUM_THREADS": str(task.threads)}
    log = out.with_suffix(".log")
    started, peak = time.monotonic(), 0
    spent: dict[int, float] = {}  # process -> seconds
    with (
        log.open("w") as log_file,
        subprocess.Popen(
            command, env=os.environ | threads, stdout=log_file, stderr=log_file
        ) as child,
    ):
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, memory(process))
            spent |= processor_s(process)
            time.sleep(EVERY_S)
    seconds = time.monotonic() - started
    if child.returncode:
        raise RuntimeError(f"{contender.name} ended with {child.returncode}: see {log}")
    return Cost(seconds, sum(spent.values()), peak)


def processor_s(process: psutil.Process) -> dict[int, float]:
    """Seconds of processors that a process, and each below it, has had."""
    found = {}
    for each in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            found[each.pid] = sum(each.cpu_times()[:2])
    return found


def embeddings(contender: Contender, out: Path) -> dict[str, np.ndarray]:
    """By key, float32 of unit length: as stored, in float16, they have it only nearly."""
    found = {}
    for keys, rows in contender.read(out):
        unit = rows / np.linalg.norm(rows.astype(np.float32), axis=1, keepdims=True)
        found |= dict(zip(keys, unit, strict=True))
    return found


def least_cosine(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Of the embeddings of the same image."""
    if found.keys() != expected.keys():
        raise RuntimeError(f"{len(found)} images were embedded, {len(expected)} expected")
    return min(float(found[key] @ expected[key]) for key in found)


def round_of(case: str, task: Task, few: Task, options: argparse.Namespace) -> None:
    """Every contender asked for once, ratecluster first, since the others are compared with it."""
    work, reference = options.work, folder_of(OURS, case, options.work)
    for contender in sorted(CONTENDERS, key=lambda each: each is not OURS):
        if contender.name not in options.only:
            continue
        out = folder_of(contender, case, work)
        start = run(contender, few, out, work / "venvs")
        whole = run(contender, task, out, work / "venvs")
        found = embeddings(contender, out)
        row = {
            "case": case,
            "name": contender.name,
            "images": len(found),
            "start": asdict(start),
            "whole": asdict(whole),
            "cosine": least_cosine(found, embeddings(OURS, reference)),
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        with (work / "results.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")


def table(rows: list[dict]) -> None:
    """Medians, and the rounds that they are of."""
    print(f"{'':<20} {'images/s':>9} {'steady':>8} {'ms':>6} {'GiB':>5}  cosine   rounds of steady")
    for contender in CONTENDERS:
        mine = [row for row in rows if row["name"] == contender.name]
        if not mine:
            continue
        rates = [row["images"] / row["whole"]["wall_s"] for row in mine]
        steady = [1 / _each(row, "wall_s") for row in mine]
        busy_ms = [1e3 * _each(row, "cpu_s") for row in mine]
        peak = max(row["whole"]["peak"] for row in mine)
        print(
            f"{contender.name:<20} {median(rates):>9.1f} {median(steady):>8.1f} "
            f"{median(busy_ms):>6.1f} {peak / 2**30:>5.2f}  "
            f"{min(row['cosine'] for row in mine):.5f}  {', '.join(f'{s:.1f}' for s in steady)}"
        )


def _each(row: dict, what: str) -> float:
    """Seconds of an image beyond the first few."""
    return (row["whole"][what] - row["start"][what]) / (row["images"] - materials.FEW)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="shards, weights, venvs, results")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["photos", "small"])
    names = [contender.name for contender in CONTENDERS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--source", default=EMOJI, help="shards of pictures to make photos of")
    parser.add_argument("--photos", type=int, default=500, help="how many, in 4 shards")
    parser.add_argument("--small", default=EMOJI, help="shards of small images")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


def prepare(case: str, options: argparse.Namespace) -> tuple[Task, Task]:
    """The case's task, and the same with few images."""
    folder: Path = options.work
    if case == "photos":
        shards = materials.photos(folder / "photos", options.source, options.photos)
    elif case == "small":
        shards = Path(options.small)
    else:
        shards = materials.first(folder / "small", Path(options.small), options.photos)
    model = materials.pico() if case == "small" else materials.vit(folder)
    few = materials.first(folder / f"few-{case}", shards, materials.FEW)
    how = (materials.suffix(shards), model, options.threads, options.batch_size)
    return Task(shards, *how), Task(few, *how)


def main() -> None:
    """Run the rounds asked for; print what is known of the cases."""
    options = arguments()
    options.work = options.work.absolute()  # commands of others take it for what they like
    options.work.mkdir(parents=True, exist_ok=True)
    tasks = {case: prepare(case, options) for case in options.case}
    for _ in range(options.rounds):
        for case, (task, few) in tasks.items():
            round_of(case, task, few, options)
    known = [json.loads(line) for line in (options.work / "results.jsonl").open()]
    print(f"{machine()}; {options.threads} threads, batches of {options.batch_size}")
    for case, (task, _) in tasks.items():
        print(f"\n{case}: {materials.count(task.shards)} images, {task.model.name}")
        table([row for row in known if row["case"] == case])


if __name__ == "__main__":
    main()
