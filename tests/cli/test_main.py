"""The command line: the messages about mistakes, in one line, before anything is made."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import ray
import typer
from ray.data import ActorPoolStrategy
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from pipeline.cli import main as cli
from pipeline.cli import options, stage_commands
from pipeline.runtime import config, progress, tasks
from pipeline.runtime.errors import UserError
from pipeline.store import lock
from tests import fake_run, small_run
from tests.conftest import ROOT
from tests.store.test_lock import elsewhere, until

BUNDLED = str(Path(__file__).parents[2] / "examples" / "noto-emoji")


@pytest.fixture
def refuse(tmp_path, capfd):
    """Runs a command that must fail with code 2, say one line, and leave nothing; gives the line.

    {tmp} in an argument is the test's folder; the root, where there is to be one, is {tmp}/run.
    """

    def run(*arguments: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        assert cli.invoke([a.replace("{tmp}", str(tmp_path)) for a in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and err.startswith("ratecluster: "), err
        assert sorted(tmp_path.rglob("*")) == before
        assert ray.is_initialized() == joined
        return err.removeprefix("ratecluster: ").rstrip()

    joined = ray.is_initialized()  # by other tests
    return run


EMBED = ("embed", "--shards", BUNDLED, "--root", "{tmp}/run")
RUN = ("run", "--shards", BUNDLED, "--root", "{tmp}/run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*EMBED, "--set", "embed.batchsize=3"), "embed.batchsize; did you mean batch_size?"),
        ((*RUN, "--set", "train.step=3"), "train.step; did you mean steps?"),
        ((*EMBED, "--set", "embd.batch_size=3"), "unknown section embd; did you mean embed?"),
        ((*EMBED, "--set", "embed.batch_size"), "write it as section.key=value"),
        ((*EMBED, "--set", "embed.batch_size=many"), "embed.batch_size = 'many': give a whole"),
        ((*EMBED, "--set", "embed.batch_size=0"), "embed.batch_size = 0: give 1 or more"),
        ((*RUN, "--set", "train.eta=nan"), "train.eta = nan: give a finite number"),
        ((*EMBED, "--set", "embed.model=ViT-B-33"), "unknown model 'ViT-B-33'; did you mean ViT-B"),
        ((*EMBED, "--set", "embed.model=ViT-B-32"), "needs pretrained weights: choose one of"),
        ((*RUN, "--set", "caption.vocabulary=imagnet"), "cannot read vocabulary 'imagnet'"),
        ((*RUN, "--set", "train.vocabulary=imagnet"), "cannot read vocabulary 'imagnet'"),
        ((*EMBED, "--config", "{tmp}/none.toml"), "none.toml cannot be read: No such file"),
        (("embed", "--shards", BUNDLED), "Missing option '--root'; see"),
        (("embed", "--root", "{tmp}/run"), "Missing option '--shards'"),
        ((*EMBED, "--rot", "x"), "No such option: --rot"),
        (("embbed",), "No such command 'embbed'"),
        (("embed", "--shards", BUNDLED, "--root", ""), "folder is empty text"),
        (("embed", "--shards", BUNDLED, "--root", "nosuch://x"), "Protocol not known: nosuch"),
        (("embed", "--shards", "nosuch://x/*.tar", "--root", "{tmp}/run"), "nosuch://x/*.tar"),
        (("shards", "--from", "{tmp}/none", "--out", "{tmp}/run"), "no such folder"),
    ],
)
def test_mistakes_are_named_before_anything_is_made(refuse, arguments, message):
    assert message in refuse(*arguments)


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        (f"{BUNDLED}/{{00000..00009}}.tar", "6 of 10 shards of .* are missing, the first: .*00004"),
        (f"{BUNDLED}/x*.tar", r"no shard matches .*x\*\.tar \(taken as a glob\)"),
        ("{tmp}/nowhere", r"no shard matches .*nowhere \(taken as a folder\)"),
        ("{tmp}", r"no shard matches .* \(taken as a folder\)"),
    ],
)
@pytest.mark.parametrize("command", ["embed", "run"])
def test_shards_that_are_not_there(refuse, command, shards, message):
    line = refuse(command, "--shards", shards, "--root", "{tmp}/run")
    assert re.search(message, line) and "correct --shards" in line


def test_a_root_that_cannot_be_written(refuse, tmp_path):
    (tmp_path / "file").write_text("mine")
    for command in ("embed", "run"):
        line = refuse(command, "--shards", BUNDLED, "--root", "{tmp}/file/run")
        assert "file/run cannot be written: Not a directory; choose another" in line


def test_an_empty_vocabulary(refuse, tmp_path):
    (tmp_path / "words.txt").write_text("# none\n\n")
    line = refuse(*RUN, "--set", "caption.vocabulary={tmp}/words.txt")
    assert "words.txt has no words; write one word or phrase per line" in line


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "none.txt'"),
        (b"dog\nca\xff", "none.txt, line 2: not UTF-8"),
        (b"dog\ncat\x07", "none.txt, line 2: control character"),
        (b"# no words\n", "none.txt has no words"),
    ],
)
def test_an_own_list_that_cannot_be_used(refuse, tmp_path, data, message):
    if data is not None:
        (tmp_path / "none.txt").write_bytes(data)
    assert message in refuse(*RUN, "--captions-from", "{tmp}/none.txt")


def test_captions_from_is_the_setting():
    own = options.Common(sets=["caption.alt_texts=0"]).with_captions('my "list" 小.txt')
    loaded = config.load(options.KINDS, None, own.sets)["caption"]
    assert loaded.vocabulary == ('my "list" 小.txt',) and loaded.alt_texts == 0
    assert options.Common().with_captions(None).sets == []


@pytest.mark.parametrize("command", [RUN, ("caption", "--root", "{tmp}/run")])
def test_a_namer_without_its_key(refuse, command):
    sets = ("caption.namer=http://localhost:1", "caption.namer_model=m", "caption.namer_key=NO_KEY")
    line = refuse(*command, *(part for each in sets for part in ("--set", each)))
    assert line == "caption.namer_key: the environment variable NO_KEY is not set; set it"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[embed\n", "is not valid TOML"),
        ("\x00\x01", "is not valid TOML"),
        ("[embed]\nbatchsize = 3", "unknown setting embed.batchsize; did you mean batch_size?"),
        ("[embedd]\nbatch_size = 3", "unknown section [embedd]; did you mean embed?"),
        ("batch_size = 3", "batch_size is outside a section"),
    ],
)
def test_config_files(refuse, tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    assert message in refuse(*EMBED, "--config", "{tmp}/c.toml")


STAGES = ["train", "select-k", "caption", "write", "report", "evaluate"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_without_the_one_before_says_which_to_run(refuse, stage, tmp_path):
    sets = ("--set", "evaluate.label=label") if stage == "evaluate" else ()
    line = refuse(stage, "--root", "{tmp}/run", *sets)
    assert line == f"{tmp_path}/run: embed has not finished there; run `ratecluster embed` first"


def test_the_first_stage_that_is_missing_is_named(refuse, tmp_path):
    small_run.build(tmp_path, small_run.axis)
    (tmp_path / "run" / "network" / "manifest.json").unlink()
    for stage in STAGES[1:]:
        assert "run `ratecluster train` first" in refuse(stage, "--root", "{tmp}/run")


# ---- help


@pytest.mark.parametrize("command", ["shards", "embed", "run", "status", *STAGES])
def test_help_lists_the_settings_with_defaults(command, capfd):
    assert cli.invoke([command, "--help"]) == 0
    message = " ".join(capfd.readouterr().out.split()).replace("- ", "-")  # of words that were cut
    section = command.replace("-", "_")
    sections = [section, "run"] if section != "shards" else [section]
    if command in ("run", "status"):
        sections = [name for name in options.KINDS if name not in ("shards", "index")]
    rows = config.describe({name: options.KINDS[name] for name in sections})
    assert rows
    for name, default, help in rows:
        assert f" {name} {help} [{default}]".replace("- ", "-") in message


def test_no_command_is_help(capfd):
    assert cli.invoke([]) == 0
    out, _ = capfd.readouterr()
    assert all(f"  {name} " in out for name in ("shards", "embed", "run", "status", *STAGES))


# ---- failures


@pytest.fixture
def raising(monkeypatch):
    """A command line of one command, `go`, that does what it is given."""

    def put(action) -> None:
        app = typer.Typer()
        app.command("go")(lambda: action())
        app.callback()(lambda: None)
        monkeypatch.setattr(cli, "app", app)

    return put


def mistake(*_: object) -> None:
    raise UserError("mend it")


def failure(*_: object) -> None:
    raise RuntimeError("first line\nthe disk is gone")


class Broken:
    """An actor that cannot begin."""

    def __init__(self) -> None:
        mistake()

    def __call__(self, row: dict) -> dict:
        return row


class Refusing:
    """An actor that refuses what it gets."""

    def __call__(self, row: dict) -> dict:
        return mistake() or row


def in_task(function):
    return lambda: list(tasks.results(function, [1]))


def in_actors(kind):
    rows = ray.data.from_items([{"a": 1}])
    return lambda: list(rows.map(kind, compute=ActorPoolStrategy(size=1)).iter_rows())


def in_training(function, folder):
    trainer = TorchTrainer(
        lambda: function(),
        scaling_config=ScalingConfig(num_workers=1),
        run_config=RunConfig(storage_path=str(folder)),
    )
    return trainer.fit


def test_failures_are_one_and_mistakes_two(raising, capfd):
    for action, code, message in (
        (failure, 1, "ratecluster: failed: RuntimeError: the disk is gone"),
        (mistake, 2, "ratecluster: mend it"),
    ):
        raising(action)
        assert cli.invoke(["go"]) == code
        assert capfd.readouterr().err.splitlines()[-1] == message


def test_an_interruption_says_how_to_go_on(raising, capfd):
    def interrupt() -> None:
        raise KeyboardInterrupt

    raising(interrupt)
    assert cli.invoke(["go"]) == 1
    assert "run the same command again to resume" in capfd.readouterr().err


@pytest.mark.ray
@pytest.mark.parametrize(
    ("action", "code", "message"),
    [
        (lambda _: in_task(mistake), 2, "ratecluster: mend it"),
        (lambda _: in_task(failure), 1, "ratecluster: failed: RuntimeError: the disk is gone"),
        (lambda _: in_actors(Refusing), 2, "ratecluster: mend it"),
        (lambda _: in_actors(Broken), 2, "ratecluster: mend it"),
        (lambda tmp: in_training(mistake, tmp), 2, "ratecluster: mend it"),
        (
            lambda tmp: in_training(failure, tmp),
            1,
            "ratecluster: failed: RuntimeError: the disk is gone",
        ),
    ],
    ids=["task", "task fails", "actor call", "actor start", "training", "training fails"],
)
def test_what_is_raised_on_ray_comes_out_as_it_was(
    ray_session, raising, capfd, tmp_path, action, code, message
):
    raising(action(tmp_path))
    assert cli.invoke(["go"]) == code
    assert capfd.readouterr().err.splitlines()[-1] == message
    assert ray.is_initialized()  # it was not ours to stop


@pytest.mark.ray
def test_a_stage_that_fails_has_exit_code_one(ray_session, tmp_path, capfd):
    small_run.build(tmp_path, small_run.axis)
    small_run.write_shard(tmp_path / "input" / "00001.tar", 1, small_run.SECOND[:-1])
    assert cli.invoke(["write", "--root", str(tmp_path / "run")]) == 1
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("ratecluster: failed: RuntimeError: write: sample 3 is None")


@pytest.mark.ray
def test_a_stage_that_is_done_says_nothing_new(ray_session, tmp_path):
    root = small_run.build(tmp_path, small_run.axis)
    assert cli.invoke(["write", "--root", str(root)]) == 0
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert cli.invoke(["write", "--root", f"{root}/"]) == 0
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*")}


# ---- two drivers; a driver that waits for ever


@pytest.fixture
def stuck(tiny_shards, tmp_path):
    """Starts a real `embed` of a good shard, and of one that never gives a byte."""
    shutil.copytree(tiny_shards, tmp_path / "shards")
    (tmp_path / "shards" / "00001.tar").unlink()
    os.mkfifo(tmp_path / "shards" / "00001.tar")
    started: list[subprocess.Popen] = []
    mark = f"RATECLUSTER_TEST={uuid4().hex}"  # of the driver and all of its Ray

    def start(*settings: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "jobs.embed", *STUCK[1:], *settings]
        command = [part.replace("{tmp}", str(tmp_path)) for part in command]
        env = {**os.environ, "PYTHONPATH": str(ROOT), **dict([mark.split("=")])}
        env.pop("RAY_ADDRESS", None)
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()
    until(lambda: not left_of(mark))


def test_a_command_that_was_taken_over_stops(tmp_path, monkeypatch, pythons_ctrl_c):
    monkeypatch.setattr(lock, "HEARTBEAT_S", 0.05)
    root = str(tmp_path / "run")
    message = pytest.raises(RuntimeError, match=r"was taken over by .* on far")
    with message, options.lock_root(root, progress.Config()):
        elsewhere(root, 2)
        threading.Event().wait(60)
        pytest.fail("went on")
    assert lock.read(root)[1]["owner"] == "other2"


STUCK = ("embed", "--shards", "{tmp}/shards", "--root", "{tmp}/run")


def left_of(mark: str) -> list[psutil.Process]:
    """Processes that still run with this in their environment."""
    name, _, value = mark.partition("=")
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.mark.slow
@pytest.mark.ray
def test_of_two_drivers_the_second_is_refused_and_takes_over_from_a_dead_one(
    stuck, tmp_path, tiny_shards, ray_session, capfd, caplog
):
    first, root = stuck(), tmp_path / "run"
    until((root / "embeddings" / "00000.parquet").exists)
    before = (root / "embeddings" / "00000.parquet").stat().st_mtime_ns
    for command in (STUCK, ("train", "--root", "{tmp}/run")):
        assert cli.invoke([part.replace("{tmp}", str(tmp_path)) for part in command]) == 2
        message = capfd.readouterr().err
        assert f"run is in use by {lock._process()['user']} on " in message
        assert f"(process {first.pid}, embed.py --shards" in message and "another --root" in message
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert cli.invoke(["status", "--root", str(root)]) == 0
    assert "whose process has ended; the next command takes over the lock" in re.sub(
        r"\s+", " ", capfd.readouterr().out
    )
    (tmp_path / "shards" / "00001.tar").unlink()
    shutil.copy(tiny_shards / "00001.tar", tmp_path / "shards")
    assert cli.invoke([part.replace("{tmp}", str(tmp_path)) for part in STUCK]) == 0
    assert "took over the lock of" in caplog.text
    assert (root / "embeddings" / "00000.parquet").stat().st_mtime_ns == before
    assert (root / "embeddings" / "manifest.json").exists() and not (root / ".lock").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_stage_that_stands_still_names_the_shard_and_leaves_nothing_running(stuck, tmp_path):
    process = stuck("--set", "run.stall_s=3")
    _, err = process.communicate()
    last = err.decode().splitlines()[-1]
    assert process.returncode == 1
    assert re.search(
        r"failed: RuntimeError: embed: nothing finished for 3 s, waiting for .*00001; ", last
    )
    assert "raise run.stall_s" in last and not (tmp_path / "run" / ".lock").exists()


def test_the_summary_says_how_sure_the_captions_are(tmp_path):
    paths = fake_run.build(tmp_path)
    fake_run.refinish(paths.embeddings, damaged=0)
    facts = stage_commands.summary(paths)
    assert [row["share"] for row in facts["clusters"]] == pytest.approx([0.6] * 3)
    facts["clusters"][1] |= {"caption": None, "share": None}
    *_, first, second, third = stage_commands.summary_text(facts).splitlines()
    assert first.endswith(" (60%)") and second.endswith(" None") and third.endswith(" (60%)")
