"""Which build of torch is installed, with a stub of nvidia-smi and an index on this machine."""

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tools" / "choose_torch.py"
NOWHERE = "http://127.0.0.1:9/whl/cpu"  # the port of discard: nobody listens


class Index(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def index():
    with ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/whl/cpu"
        server.shutdown()


def choose(path: Path, index: str, *asked: str) -> tuple[int, str, str]:
    environment = {**os.environ, "PATH": str(path), "TORCH_CPU_INDEX": index}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *asked], env=environment, capture_output=True, text=True
    )
    return done.returncode, done.stdout.strip(), done.stderr.strip()


def test_without_a_gpu_the_cpu_build_where_its_index_answers(tmp_path, index):
    code, arguments, why = choose(tmp_path, index)
    assert (code, arguments) == (0, f"--index-url {index} torch torchvision")
    assert why == "torch: CPU build; no NVIDIA GPU: nvidia-smi is not here"


def test_else_the_default_build(tmp_path):
    code, arguments, why = choose(tmp_path, NOWHERE)
    assert (code, arguments) == (0, "") and "does not answer" in why


def test_with_a_gpu_the_default_build(tmp_path, index):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    code, arguments, why = choose(tmp_path, index)
    assert (code, arguments) == (0, "") and "nvidia-smi is here" in why


@pytest.mark.parametrize("asked", ["cpu", "cuda", "default"])
def test_what_is_asked_for_is_taken(tmp_path, asked):
    code, arguments, why = choose(tmp_path, NOWHERE, asked)
    assert code == 0 and bool(arguments) == (asked == "cpu") and f"TORCH={asked}" in why


def test_anything_else_names_the_choices(tmp_path):
    code, arguments, why = choose(tmp_path, NOWHERE, "rocm")
    assert code != 0 and not arguments and "auto, cpu, cuda, default" in why


PYTHON = """#!/bin/sh
# Stands for python: makes no environment, runs scripts, notes what pip is asked for.
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip") echo "$@" >> "$(dirname "$0")/asked" ;;
*) exec {python} "$@" ;;
esac
"""


@pytest.mark.parametrize(("target", "extras"), [(".cpu", "cpu"), (".dev", "cpu,dev")])
def test_make_takes_the_build_from_the_environment(target, extras, tmp_path, index):
    stub, venv = tmp_path / "stub", tmp_path / "venv"
    stub.write_text(PYTHON.format(python=sys.executable))
    stub.chmod(0o755)
    command = ["make", f"PYTHON={stub}", f"VENV={venv}", f"{venv}/{target}"]

    def make(build: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": os.defpath, "TORCH_CPU_INDEX": index, "TORCH": build}
        return subprocess.run(
            command, cwd=SCRIPT.parents[1], env=env, capture_output=True, text=True
        )

    wrong = make("rocm")
    assert wrong.returncode and "TORCH=rocm: choose one of auto, cpu" in wrong.stderr
    assert not (venv / target).exists() and not (venv / "bin" / "asked").exists()
    made = make("cpu")
    assert made.returncode == 0 and "torch: CPU build; TORCH=cpu" in made.stderr
    assert (venv / target).exists() and (venv / "bin" / "asked").read_text().splitlines() == [
        f"-m pip install --quiet --index-url {index} torch torchvision",
        f"-m pip install --quiet --editable .[{extras}]",
    ]
