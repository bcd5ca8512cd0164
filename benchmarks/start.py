"""Seconds until a command has said something: with rooms that are entered late, and at once.

python -m benchmarks.start --rounds 5
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from statistics import median

LATE = [sys.executable, "-m", "pipeline"]
AT_ONCE = [sys.executable, "-c", "from pipeline import cli; cli.main()"]
COMPLETION = {"_RATECLUSTER_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
CASES = {
    "--help": (["--help"], {}),
    "embed --help": (["embed", "--help"], {}),
    "a TAB after --set": ([], {**COMPLETION, "COMP_WORDS": "ratecluster run --set "}),
}


def took(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Wall and processor seconds of a command."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, env=os.environ | environment, stdout=subprocess.DEVNULL, check=True)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Alternate the two, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for name, (words, environment) in CASES.items():
        pairs = [
            (took([*LATE, *words], environment), took([*AT_ONCE, *words], environment))
            for _ in range(rounds)
        ]
        said = []
        for way, each in zip(("late", "at once"), zip(*pairs, strict=True), strict=True):
            wall, cpu = (median(seconds) for seconds in zip(*each, strict=True))
            said.append(f"{way} {wall:.1f} s ({cpu:.1f} s of the processor)")
        print(f"{name}: {', '.join(said)}")


if __name__ == "__main__":
    main()
