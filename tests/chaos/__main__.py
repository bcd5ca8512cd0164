"""Faults done to runs of all stages, and whether anything was lost.

    python -m tests.chaos [--faults 100] [--seed 0] [--only processes cluster storage renames disk]

Every scenario is a run on a root of its own: faults strike at random times, the same command is
given again until it ends well, then `verify` must pass and every final file must be, byte for byte,
that of a run that nothing was done to. Prints a table; exit code 1 if anything was lost.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

from ray.cluster_utils import Cluster

from tests.chaos import real_run
from tests.chaos.real_run import Fault, RealRun

OF_A_RUN = {"processes": 8, "cluster": 8, "storage": 20, "renames": 8, "disk": 6}  # faults
CALM = {"seed": 0, "rate": 0.0, "most": 0, "log": "/dev/null", "hang_s": 0}  # the store works


class Chaos:
    """The shards, the undisturbed run, and all that was done."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed, self.number = folder, seed, 0
        self.faults: list[Fault] = []
        self.lost = self.duplicated = self.differing = 0
        self.ids = real_run.make_shards(folder / "shards")
        self.calm: dict[bool, dict[str, str]] = {}  # digests of undisturbed runs

    def run(self, name: str, folder: Path | None = None, faulty: bool = False) -> RealRun:
        """A root of its own; `faulty`: it and the shards lie in the store that can fail."""
        root = folder or self.folder / name
        store = "faulty://" if faulty else ""
        log, plan = self.folder / f"{name}.log", CALM if faulty else None
        return RealRun(f"{store}{self.folder}/shards", f"{store}{root}", root, log, plan=plan)

    def expected(self, faulty: bool) -> dict[str, str]:
        """Digests of the final files of a run that nothing was done to."""
        if faulty not in self.calm:
            calm = self.run("calm-store" if faulty else "calm", faulty=faulty)
            if code := real_run.wait(calm.start()):
                raise RuntimeError(f"the undisturbed run ended with {code}, see {calm.log}")
            self.calm[faulty] = real_run.finals(calm.folder)
        return self.calm[faulty]

    def scenario(self, name: str, faults: int) -> None:
        """One run under faults of one sort, and the judgement."""
        self.number += 1
        seed = self.seed * 1000 + self.number
        started = time.monotonic()
        run = SCENARIOS[name](self, f"{name}-{seed}", random.Random(seed), faults)
        self.judge(run)
        self.faults += run.faults
        kinds = ", ".join(
            f"{n} × {kind}" for kind, n in Counter(f.kind for f in run.faults).items()
        )
        seconds = time.monotonic() - started
        print(f"  seed {seed}: {run.runs} runs, {seconds:.0f} s: {kinds}", flush=True)

    def judge(self, run: RealRun) -> None:
        """Count what is lost, twice, or other than it should be."""
        found = run.ids()
        lost = [i for i in self.ids if not found[i]]
        twice = [i for i, times in found.items() if times > 1]
        final, expected = real_run.finals(run.folder), self.expected("://" in run.root)
        other = {n for n in expected.keys() | final if expected.get(n) != final.get(n)}
        for what, some in (("lost", lost), ("duplicated", twice), ("differing", sorted(other))):
            if some:
                print(f"    {what}: {len(some)}, first {some[0]}; see {run.log}", flush=True)
        self.lost += len(lost)
        self.duplicated += len(twice)
        self.differing += len(other)
        run.plan = run.plan and CALM
        run.address = ""  # that cluster is gone
        if real_run.wait(run.start("verify")):
            self.differing += 1
            print(f"    verify found violations, see {run.log}", flush=True)


def processes(chaos: Chaos, name: str, dice: random.Random, faults: int) -> RealRun:
    """Encoders, trainers, tasks and the driver are killed."""
    run = chaos.run(name)
    real_run.run_struck(run, dice, faults)
    return run


def storage(chaos: Chaos, name: str, dice: random.Random, faults: int) -> RealRun:
    """Root and shards lie in a store whose calls fail, hang, are slow or cut short."""
    return by_plan(chaos.run(name, faulty=True), dice, faults)


def renames(chaos: Chaos, name: str, dice: random.Random, faults: int) -> RealRun:
    """Root and shards lie on a disk whose renames fail."""
    return by_plan(chaos.run(name), dice, faults)


def by_plan(run: RealRun, dice: random.Random, faults: int) -> RealRun:
    """Runs until one ends well; what fails is drawn by the processes of the run themselves."""
    log = run.log.with_suffix(".faults")
    seed, hang_s = dice.randrange(10**6), real_run.SETTINGS["run.stall_s"] * 2
    for attempt in range(6):
        rate = 0.15 if attempt < 4 else 0.0
        run.plan = {"rate": rate, "most": faults, "log": str(log), "hang_s": hang_s}
        run.plan["seed"] = seed + attempt
        since = len(run.faults)
        code = real_run.wait(run.start())
        lines = log.read_text().splitlines() if log.exists() else []
        for line in lines[since:]:
            kind, path = line.split("\t")
            run.faults.append(Fault(kind, Path(path).parent.name))
        run.settle(since, code)
        if code == 0:
            return run
    raise AssertionError(f"six runs did not end well, see {run.log}")


def disk(chaos: Chaos, name: str, dice: random.Random, faults: int) -> RealRun:
    """The disk fills up again and again, and is given a little more each time."""
    small = chaos.folder / f"{name}-disk"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(small)]
    subprocess.run(mount, check=True)
    try:
        run = chaos.run(name, small / "run")
        size_kb = 200
        while real_run.wait(run.start()) != 0:
            if len(run.faults) > 3 * faults:
                raise AssertionError(f"no end of it, see {run.log}")
            run.faults.append(Fault("disk full", run.stage(), "recovered by rerun"))
            size_kb = size_kb + dice.randrange(400, 1500) if len(run.faults) < faults else 60_000
            remount = ["mount", "-o", f"remount,size={size_kb}k", str(small)]
            subprocess.run(remount, check=True)
        kept = chaos.run(name)
        shutil.copytree(run.folder, kept.folder)
        kept.faults, kept.runs = run.faults, run.runs
        return kept
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def cluster(chaos: Chaos, name: str, dice: random.Random, faults: int) -> RealRun:
    """Nodes of a cluster are killed beside its processes; a new one comes for each."""
    node = {"num_cpus": 2, "object_store_memory": 100_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 3})
    worker = nodes.add_node(**node)
    run = chaos.run(name)
    run.address = nodes.address
    try:
        for _ in range(10):
            driver, since, began = run.start(), len(run.faults), time.monotonic()
            while driver.poll() is None:
                real_run.in_time(driver, began)
                time.sleep(dice.uniform(4, 14))
                if driver.poll() is not None or len(run.faults) >= faults:
                    continue
                if dice.random() < 0.5:
                    real_run.strike(run, driver, os.getpid(), dice)
                    continue
                run.faults.append(Fault("raylet killed", run.stage()))
                nodes.remove_node(worker, allow_graceful=False)
                worker = nodes.add_node(**node)
            code = driver.wait()
            run.settle(since, code)
            if code == 0:
                return run
        raise AssertionError(f"ten runs did not end well, see {run.log}")
    finally:
        nodes.shutdown()


Scenario = Callable[[Chaos, str, random.Random, int], RealRun]
SCENARIOS: dict[str, Scenario] = {
    "processes": processes,
    "cluster": cluster,
    "storage": storage,
    "renames": renames,
    "disk": disk,
}


def table(faults: list[Fault]) -> str:
    """Fault, times injected, survived, recovered by rerun."""
    rows: dict[str, Counter[str]] = defaultdict(Counter)
    for fault in faults:
        rows[fault.kind][fault.fate] += 1
    lines = [f"{'fault':36} {'injected':>8} {'survived':>8} {'recovered by rerun':>18}"]
    for kind, fates in sorted(rows.items()):
        survived, rerun = fates["survived"], fates["recovered by rerun"]
        lines.append(f"{kind:36} {sum(fates.values()):8} {survived:8} {rerun:18}")
    total = Counter(f.fate for f in faults)
    lines.append(
        f"{'all':36} {len(faults):8} {total['survived']:8} {total['recovered by rerun']:18}"
    )
    return "\n".join(lines)


def main() -> int:
    """Scenarios of every sort in turn until so many faults are done."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--of-a-run", type=int, default=100, help="at most so many on one root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--folder", type=Path, help="for runs and logs; none: a temporary one")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="ratecluster-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"chaos of seed {options.seed} in {folder}", flush=True)
    chaos = Chaos(folder, options.seed)
    while len(chaos.faults) < options.faults:
        for name in options.only:
            if (left := options.faults - len(chaos.faults)) > 0:
                print(name, flush=True)
                chaos.scenario(name, min(OF_A_RUN[name], options.of_a_run, left))
    stages = Counter(fault.stage for fault in chaos.faults)
    print(table(chaos.faults))
    print("by stage: " + ", ".join(f"{stage} {n}" for stage, n in sorted(stages.items())))
    print(
        f"samples lost {chaos.lost}, duplicated {chaos.duplicated}; "
        f"files differing {chaos.differing}"
    )
    return int(bool(chaos.lost or chaos.duplicated or chaos.differing))


if __name__ == "__main__":
    sys.exit(main())
