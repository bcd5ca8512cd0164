"""Seconds that light commands take: --help, status, run with nothing left to do, search --text.

python -m benchmarks.start [--root URL] [--rounds N]

--root is a run of examples/noto-emoji with jobs/configs/demo.toml and an index. Without it, one is
made first, which takes one or two minutes.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = ["--shards", str(REPOSITORY / "examples" / "noto-emoji")]
EXAMPLE += ["--config", str(REPOSITORY / "jobs" / "configs" / "demo.toml")]
HEAVY = ("torch", "ray", "sklearn", "scipy", "pandas", "open_clip", "faiss", "pyarrow")
COMMAND = """
import sys
from pipeline.cli.main import invoke
code = invoke()
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own; the last line of stderr names its modules."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )


def measure(*words: str) -> tuple[float, float, set[str]]:
    """Wall seconds, processor seconds, and the imported packages."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = run(*words)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    packages = {name.partition(".")[0] for name in done.stderr.splitlines()[-1].split()}
    return wall, processor, packages


def main() -> None:
    """Print a line per command: median seconds, and which heavy packages it imported."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", help="a finished run of examples/noto-emoji")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = arguments.root or f"{folder}/run"
        if not arguments.root:
            run("run", *EXAMPLE, "--root", root)
            run("index", "--root", root)
        commands = {
            "--help": ["--help"],
            "status": ["status", "--root", root],
            "run, all done": ["run", *EXAMPLE, "--root", root],
            "search --text": [
                *("search", "--root", root, "--text", "flag", "--html", f"{folder}/found.html")
            ],
        }
        for name, words in commands.items():
            walls, processors, packages = zip(
                *(measure(*words) for _ in range(arguments.rounds)), strict=True
            )
            heavy = ", ".join(name for name in HEAVY if name in packages[-1]) or "nothing heavy"
            print(
                f"{name:<14} {median(walls):5.2f} s, {median(processors):5.2f} s of the processor; "
                f"imports {heavy}"
            )


if __name__ == "__main__":
    main()
