"""Wall time and peak memory of a command with all the processes it starts, Ray's included.

    python -m benchmarks.whole_run make demo

Memory is the sum of proportional set sizes (shared pages counted once), sampled twice a second.
"""

import subprocess
import sys
import time

import psutil

EVERY_S = 0.5


def memory(process: psutil.Process) -> int:
    """Bytes held by a process and all below it; those that end meanwhile count nothing."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def main() -> None:
    """Run the command; print what it took after what it printed."""
    started, peak = time.monotonic(), 0
    with subprocess.Popen(sys.argv[1:]) as child:
        process = psutil.Process(child.pid)
        while child.poll() is None:
            peak = max(peak, memory(process))
            time.sleep(EVERY_S)
    seconds = time.monotonic() - started
    print(
        f"{' '.join(sys.argv[1:])}: exit {child.returncode}, {seconds:.0f} s, "
        f"peak {peak / 2**30:.2f} GiB"
    )


if __name__ == "__main__":
    main()
