"""Speed and memory of the mathematics, against the formulas written plainly, in one run.

    python -m benchmarks.mcr2 [--only exactness step …]

Every line has its bar beside it. Everything runs on one thread, as training and select_k do (and
torch 2.15's batched determinants fail on more: its log says SLASWP). Memory is the growth of the
peak of a fresh process. Takes a quarter of an hour, and 13 GB for the plain formula at d = 1024.
"""

import argparse

from benchmarks.mcr2 import columns, losses, stages, workers
from benchmarks.mcr2.measuring import machine
from pipeline.mcr2.threads import one_thread

SECTIONS = {
    "exactness": losses.exactness,
    "step": losses.small_step,
    "large": losses.large_step,
    "sampling": columns.sampling,
    "workers": workers.workers,
    "spectral": stages.curve,
    "assignment": stages.assigning,
    "tree": stages.growing,
}


def main() -> None:
    """Print the sections asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    options = parser.parse_args()
    print(f"{machine()}, one thread per process, processor seconds")
    with one_thread():
        for name in options.only:
            SECTIONS[name]()


if __name__ == "__main__":
    main()
