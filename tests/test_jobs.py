"""The entry points, and jobs that are submitted to a real head as a user does it."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.cli import options
from tests import machines
from tests.chaos import real_run
from tests.conftest import ROOT, run_arguments

JOBS = sorted(p.stem for p in (ROOT / "jobs").glob("*.py") if p.stem[0] != "_")
SENT = {"pipeline", "jobs", "pyproject.toml", "my.toml", "words.txt"}  # of a clone in use


def test_there_is_one_for_every_stage_and_for_all():
    assert set(JOBS) == options.KINDS.keys() - {"run", "index", "embeddings"} | {"all"}


@pytest.mark.parametrize("job", JOBS)
def test_each_runs_its_stage_and_ends_with_its_code(job, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [job, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    assert ended.value.code == 0
    section = "embed" if job == "all" else job
    assert f"  {section}." in capsys.readouterr().out


@dataclass
class Head:
    """A head of Ray with its dashboard, and the shell of a user who has a clone and the token."""

    dashboard: str
    clone: Path
    shell: dict[str, str]
    temp: Path  # of Ray

    def ray(self, *words: str, **environment: str) -> tuple[int, str]:
        """`ray …` in the clone: its exit code, and its output."""
        done = subprocess.run(
            [machines.RAY, *words],
            cwd=self.clone,
            env={**self.shell, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout

    def submit(self, *words: str, name: str = "", **environment: str) -> tuple[int, str]:
        """`ray job submit` as the README has it; waits for the end unless it has a name."""
        named = ["--submission-id", name, "--no-wait"] if name else []
        command = ["job", "submit", *named, "--working-dir", ".", "--", "python", "-m", *words]
        return self.ray(*command, RAY_ADDRESS=self.dashboard, **environment)

    def facts(self, output: str) -> tuple[str, int, str]:
        """Status, exit code and message of the job with this output of its submission."""
        (name,) = set(re.findall(r"Job '(\w+)' submitted successfully", output))
        script = "import json, sys; from ray.job_submission import JobSubmissionClient as Jobs\n"
        script += "job = Jobs(sys.argv[1]).get_job_info(sys.argv[2])\n"
        script += "print(json.dumps([job.status, job.driver_exit_code, job.message]))"
        command = [sys.executable, "-c", script, self.dashboard, name]
        status, code, message = json.loads(subprocess.check_output(command, env=self.shell))
        return status, code, message


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Started as the docs say, `ray get-auth-token --generate` first, in a home of its own.

    Its path is short, since Ray's sockets lie below it.
    """
    home, clone = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp")), tmp_path_factory.mktemp("clone")
    for name in ("pipeline", "jobs"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".gitignore", ".rayignore", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, clone)
    (clone / "my.toml").write_text("[embed]\nbatch_size = 16\n")
    (clone / "words.txt").write_text("word\n")
    for name in ("my-shards/00000.tar", "my-run/embeddings/00000.parquet", ".venv/lib/torch.so"):
        (clone / name).parent.mkdir(parents=True)
        with (clone / name).open("wb") as file:
            file.truncate(600 << 20)  # more than Ray would take
    shell = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    shell |= {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token"}
    shell["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{shell['PATH']}"
    port, dashboard, agent, client = machines.free_ports(4)
    made = Head(f"http://127.0.0.1:{dashboard}", clone, shell, home / "ray")
    code, token = made.ray("get-auth-token", "--generate")
    assert code == 0
    assert (home / ".ray" / "auth_token").read_text() in token
    log = home / "head.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [
                *(machines.RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=4"),
                *(f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
                *(f"--ray-client-server-port={client}", "--object-store-memory=200000000"),
                f"--temp-dir={made.temp}",
            ],
            env=shell,
            stdout=file,
            stderr=file,
        )
    try:
        machines.wait_for(lambda: "Ray runtime started" in log.read_text(), log.read_text)
        yield made
    finally:
        real_run.end(process)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_of_all_stages(head, tiny_shards, tmp_path):
    root = tmp_path / "run"
    _, *arguments = [*run_arguments(tiny_shards, root), "--set", "train.words=0"]
    code, output = head.submit("jobs.all", *arguments, name="first")
    assert code == 0, output
    machines.wait_for((root / ".lock").exists, lambda: head.ray("job", "logs", "first")[1])
    sent = head.temp.glob("session_latest/runtime_resources/working_dir_files/_ray_pkg_*/")
    assert [{path.name for path in folder.iterdir()} for folder in sent] == [SENT]

    code, output = head.submit("jobs.embed", "--shards", str(tiny_shards), "--root", str(root))
    status, exit_code, message = head.facts(output)
    assert (code, status, exit_code) == (1, "FAILED", 2), message
    assert re.search(rf"ratecluster: {root} is in use by .* all.py --shards", message)

    address = {"RAY_ADDRESS": head.dashboard}
    code, output = head.ray("job", "logs", "--follow", "first", **address)
    assert "Job 'first' succeeded" in output, output
    lines = output.splitlines()
    for stage in ("embed", "train", "select_k", "caption", "write", "evaluate", "report"):
        assert any(line.startswith(f"{stage}: ") for line in lines), f"{stage}:\n{output}"
    assert "\r" not in output and "\x1b[2K" not in output
    assert f"report: {root}/report/index.html" in lines

    code, output = head.submit("jobs.all", *arguments)
    assert code == 0, output
    assert output.count("already done") == 7
    assert head.facts(output)[0] == "SUCCEEDED"


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_whose_stage_fails_says_why(head, tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "00000.tar").write_bytes(b"no tar" * 1000)
    paths = ["--shards", str(tmp_path / "shards"), "--root", str(tmp_path / "run")]
    code, output = head.submit("jobs.all", *paths, "--config", "my.toml")
    status, exit_code, message = head.facts(output)
    assert (code, status, exit_code) == (1, "FAILED", 1), message
    why = "ratecluster: failed: RuntimeError: embed: 1 of 1 shards cannot be read at all"
    assert any(line.startswith(why) for line in output.splitlines())
    assert why in message


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("mode", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_TOKEN": "0" * 64}])
def test_a_job_without_the_token_is_refused(head, mode):
    code, output = head.submit("jobs.report", "--root", "nowhere", **mode)
    assert code != 0
    assert "submitted successfully" not in output
    assert "AuthenticationError" in output or "401" in output, output
