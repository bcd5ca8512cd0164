"""Prints the pip arguments that choose the build of torch; on stderr, which build and why.

    python tools/choose_torch.py [auto|cpu|cuda|default]

The default build on PyPI brings CUDA on Linux: 5 GB. On a machine without an NVIDIA GPU the CPU
build is enough. It lies on an index of its own, which must answer within three seconds.
"""

import os
import shutil
import sys
import urllib.request

CHOICES = ("auto", "cpu", "cuda", "default")
INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
TIMEOUT_S = 3


def choose(asked: str) -> tuple[str, str]:
    """Arguments for `pip install`, and one line that says which build they choose and why."""
    if asked == "cpu":
        return _cpu(), "TORCH=cpu"
    if asked != "auto":
        return "", f"TORCH={asked}"
    if shutil.which("nvidia-smi"):
        return "", "nvidia-smi is here, so this machine has an NVIDIA GPU"
    try:
        urllib.request.urlopen(f"{INDEX}/torch/", timeout=TIMEOUT_S).close()
    except OSError as error:
        return "", f"no NVIDIA GPU, but {INDEX} does not answer ({error})"
    return _cpu(), "no NVIDIA GPU: nvidia-smi is not here"


def _cpu() -> str:
    return f"--index-url {INDEX} torch torchvision"


def main() -> None:
    """Print both."""
    asked = (sys.argv[1:] or ["auto"])[0] or "auto"
    if asked not in CHOICES:
        raise SystemExit(f"TORCH={asked}: choose one of {', '.join(CHOICES)}")
    arguments, why = choose(asked)
    build = "CPU build" if arguments else "default build (with CUDA on Linux)"
    print(f"torch: {build}; {why}", file=sys.stderr)
    print(arguments)


if __name__ == "__main__":
    main()
