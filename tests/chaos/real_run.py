"""One run of all stages as a real process, what may be done to it, and what must come of it."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from pipeline.artifacts import layout
from pipeline.store import tables
from pipeline.store.shard_writer import ShardWriter
from pipeline.store.shards import ShardReader

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "examples" / "noto-emoji"
SHARDS, SAMPLES = 8, 40
TIMEOUT_S = 900
RATECLUSTER = (sys.executable, "-c", "from pipeline.cli.main import main; main()")
WORDS = str(ROOT / "tests" / "words.txt")  # a hundred: the whole vocabulary takes 10 s to encode
SETTINGS = {
    "embed.batch_size": 8,
    "train.recipe": "mcr2",  # all steps, so that there is time for faults
    "train.steps": 60,
    "train.checkpoint_steps": 10,
    "train.batch_size": 128,
    "train.vocabulary": WORDS,
    "caption.vocabulary": WORDS,
    "select_k.k": 6,
    "run.stall_s": 120,
}
VICTIMS = {  # titles of Ray's processes
    "encoder killed": ("MapWorker",),
    "trainer killed": ("RayTrainWorker", "TrainController"),
    "task killed": ("count_ngrams", "votes", "statistics", "assign_parts", "write_shards", "IDLE"),
}


def make_shards(folder: Path) -> list[str]:
    """SHARDS shards of SAMPLES bundled images each; the keys of their samples, in order."""
    folder.mkdir()
    ids = []
    with (BUNDLED / "00000.tar").open("rb") as stream:
        samples = [
            s for s, _ in zip(ShardReader(stream, None), range(SHARDS * SAMPLES), strict=False)
        ]
    for number in range(SHARDS):
        stem = f"{number:05d}"
        with (folder / f"{stem}.tar").open("wb") as file, ShardWriter(file) as writer:
            for sample in samples[number * SAMPLES : (number + 1) * SAMPLES]:
                ids.append(f"{stem}/{sample.key}")
                for member in sample.members:
                    writer.add(member.name, member.data)
            writer.add("broken.png", b"no picture")
            ids.append(f"{stem}/broken")
    return ids


def finals(root: Path) -> dict[str, str]:
    """Digest of every final file of a run but those that hold times."""
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.suffix in (".parquet", ".tar", ".safetensors") and path.name != "history.parquet"
    }


@dataclass
class Fault:
    """Something done to a run."""

    kind: str
    stage: str
    fate: str = ""  # survived | recovered by rerun


@dataclass
class RealRun:
    """Shards and a root, and the processes that work on them."""

    shards: str
    root: str  # URL
    folder: Path  # where the root lies
    log: Path
    address: str = ""
    plan: dict[str, Any] | None = None
    faults: list[Fault] = field(default_factory=list)
    runs: int = 0

    def start(self, what: str = "run") -> subprocess.Popen[bytes]:
        """`ratecluster run`, or `verify`."""
        environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
        paths = [str(ROOT)]
        environment.pop("RAY_ADDRESS", None)
        if self.address:
            environment["RAY_ADDRESS"] = self.address
        if self.plan:
            environment["CHAOS_PLAN"] = json.dumps(self.plan)
            paths.append(str(Path(__file__).parent / "site"))
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [*RATECLUSTER, what, "--root", self.root]
        if what == "run":
            self.runs += 1
            command += ["--shards", self.shards]
            command += [f"--set={name}={value}" for name, value in SETTINGS.items()]
        with self.log.open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=self.log.parent,
                env=environment,
                stdout=log,
                stderr=log,
            )

    def stage(self) -> str:
        """The first stage that has no manifest."""
        for folder in ("embeddings", "network", "clusters", "captions", "labels", "report"):
            if not (self.folder / folder / "manifest.json").exists():
                return folder
        return "done"

    def settle(self, since: int, code: int) -> None:
        """The fate of the faults from number `since` on, of a run that ended so."""
        for fault in self.faults[since:]:
            fault.fate = "survived" if code == 0 else "recovered by rerun"

    def ids(self) -> Counter[str]:
        """How often each sample is a row of labels."""
        folder = layout.RunPaths(str(self.folder)).labels
        found: Counter[str] = Counter()
        for name in folder.names():
            if name.endswith(".parquet"):
                found.update(tables.read(folder.file(name), ["sample_id"])["sample_id"].to_pylist())
        return found


def wait(process: subprocess.Popen[bytes]) -> int:
    """Its exit code; killed with all its children after TIMEOUT_S."""
    try:
        return process.wait(TIMEOUT_S)
    except subprocess.TimeoutExpired:
        end(process)
        raise


def in_time(process: subprocess.Popen[bytes], began: float) -> None:
    """A run that hangs fails, and does not make chaos hang."""
    if time.monotonic() - began > TIMEOUT_S:
        end(process)
        raise subprocess.TimeoutExpired(process.args, TIMEOUT_S)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a driver and all that it started."""
    children = descendants(process.pid)
    process.kill()
    process.wait()
    for child in children:
        with suppress(psutil.Error):
            child.kill()


def descendants(pid: int) -> list[psutil.Process]:
    """Processes below one."""
    with suppress(psutil.Error):
        return list(psutil.Process(pid).children(recursive=True))
    return []


def victims(pid: int, kind: str) -> list[psutil.Process]:
    """Processes of Ray below `pid` that a kind of fault may strike."""
    found = []
    for process in descendants(pid):
        with suppress(psutil.Error):
            title = process.cmdline()[0]
            if title.startswith("ray::") and any(name in title for name in VICTIMS[kind]):
                found.append(process)
    return found


def strike(run: RealRun, driver: subprocess.Popen[bytes], top: int, dice: random.Random) -> bool:
    """Kill something of a run at work; whether there was anything. `top`: above Ray's workers."""
    kind = dice.choice([*VICTIMS, "driver killed"])
    stage = run.stage()
    if kind == "driver killed":
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        run.faults.append(Fault(kind, stage))
        return True
    found = victims(top, kind)
    if not found:
        return False
    with suppress(psutil.Error):
        dice.choice(found).kill()
        run.faults.append(Fault(kind, stage))
        return True
    return False


def run_struck(run: RealRun, dice: random.Random, most: int, top: int | None = None) -> None:
    """Runs under strikes until one ends well; not more than `most` strikes."""
    for _ in range(10):
        driver, since, began = run.start(), len(run.faults), time.monotonic()
        while driver.poll() is None:
            in_time(driver, began)
            time.sleep(dice.uniform(1, 12))
            if driver.poll() is None and len(run.faults) < most:
                strike(run, driver, top or driver.pid, dice)
        code = driver.wait()
        run.settle(since, code)
        if code == 0:
            return
    raise AssertionError(f"ten runs did not end well, see {run.log}")
