"""What a command says, on a terminal and elsewhere. The terminal is a real pseudo-terminal."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading

import pytest

from pipeline.cli import main as cli
from pipeline.runtime import console
from tests import fake_run
from tests.conftest import ROOT

SCRIPT = """
import logging, sys, time
from pipeline.runtime import console, progress

console.begin()
console.be_quiet("quiet" in sys.argv)
log = logging.getLogger("pipeline.demo")
with progress.StageProgress("embed", 4, "shards") as bar:
    for _ in range(4):
        time.sleep(0.2)
        bar.advance(samples=500, rejected=1)
        log.info("hostile \\x1b[2J %s", "[bold]text[/]")
console.log_finished(log, "embed", 69.4, "2,000 samples", "4 rejected", "29 samples/s")
console.log_already_done(log, "train", "my-run/network")
log.error("it broke")
"""
HOSTILE = "hostile \\x1b[2J [bold]text[/]"
PLAIN = [
    *[HOSTILE] * 4,
    "embed: 2,000 samples, 4 rejected, 29 samples/s, 69.4 s",
    "train: already done, my-run/network",
    "it broke",
]


def message(*arguments: str, columns: int = 0, **environment: str) -> str:
    """What SCRIPT says on stderr: a terminal of so many columns, or a pipe."""
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS")}
    env |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment}
    command = [sys.executable, "-c", SCRIPT, *arguments]
    if not columns:
        return subprocess.run(command, env=env, stderr=subprocess.PIPE, check=True).stderr.decode()
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    pieces: list[bytes] = []
    reader = threading.Thread(target=_read, args=(ours, pieces))
    reader.start()
    subprocess.run(command, env=env, stderr=theirs, check=True)
    os.close(theirs)
    reader.join()
    os.close(ours)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def _read(terminal: int, pieces: list[bytes]) -> None:
    try:
        while piece := os.read(terminal, 65536):
            pieces.append(piece)
    except OSError:  # Linux's word for the end of a pseudo-terminal
        return


def screen(text: str) -> list[str]:
    """The lines that are left on a terminal: of what rich uses, erasing and going up."""
    lines, row = [""], 0
    for piece in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", text):
        if piece == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif found := re.fullmatch(r"\x1b\[(\d*)A", piece):
            row -= int(found[1] or 1)
        elif piece and piece[0] not in "\x1b\r":
            lines[row] += piece
    return [line.rstrip() for line in lines if line.strip()]


def test_on_a_terminal_a_bar_lives_and_every_stage_leaves_one_line():
    text = message(columns=100)
    assert re.search(
        r"embed.*2/4 shards · 1,000 samples · .*samples/s · 2 rejected · 0:00 left", text
    )
    assert "\x1b[2J" not in text
    assert screen(text) == [
        *[HOSTILE] * 4,
        "✓ embed     2,000 samples · 4 rejected · 29 samples/s · 1:09",
        "· train     already done",
        "it broke",
    ]


def test_on_a_narrow_terminal_the_bar_stays_on_one_line():
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", message(columns=40))
    bars = [line for line in re.split(r"[\r\n]", text) if "shards" in line]
    assert bars and all(len(line) <= 40 for line in bars)


@pytest.mark.parametrize(
    ("columns", "environment"),
    [(0, {}), (100, {"NO_COLOR": "1"}), (100, {"TERM": "dumb"})],
    ids=["pipe", "NO_COLOR", "dumb"],
)
def test_elsewhere_lines_are_plain(columns, environment):
    assert message(columns=columns, **environment).splitlines() == PLAIN


@pytest.mark.parametrize("columns", [0, 100])
def test_quiet_leaves_errors(columns):
    assert message("quiet", columns=columns) == "it broke\n"


# ---- results


@pytest.fixture
def root(tmp_path):
    paths = fake_run.build(tmp_path)
    fake_run.written(paths)
    return paths.root


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_json_is_one_object_wherever_it_stands(root, capfd, first):
    command = ["report", "--root", root]
    asked = ["--json", "--quiet"]
    assert cli.invoke([*asked, *command] if first else [*command, *asked]) == 0
    out, err = capfd.readouterr()
    facts = json.loads(out)
    page = f"{root}/report/index.html"
    assert (facts["stage"], facts["root"], facts["page"]) == ("report", root, page)
    assert err == ""


def test_without_json_the_result_is_text_alone(root, capfd):
    assert cli.invoke(["report", "--root", root]) == 0
    assert capfd.readouterr().out == f"{root}/report/index.html\n"
    assert cli.invoke(["status", "--root", root, "-q"]) == 0
    assert capfd.readouterr().out.startswith("root   ")
    assert cli.invoke(["status", "--root", root, "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["stages"]) >= 5


def test_options_of_one_command_do_not_reach_the_next(root, capfd):
    assert cli.invoke(["--json", "--quiet", "report", "--root", root]) == 0
    capfd.readouterr()
    assert cli.invoke(["report", "--root", root]) == 0
    assert not capfd.readouterr().out.startswith("{")
    assert console.logging.getLogger("pipeline").level == console.logging.INFO
