"""Manual pages, completion, and how soon they come."""

import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import typer

from pipeline.cli import help_pages, options
from pipeline.cli import main as cli
from pipeline.runtime import config
from tests import fake_run
from tests.conftest import ROOT

GROUP = typer.main.get_command(cli.app)
COMMANDS = sorted(GROUP.commands)
HEAVY = {"torch", "ray", "sklearn", "scipy", "matplotlib", "open_clip", "faiss"}


def pages(capfd, command: str) -> str:
    assert cli.invoke([command, "--help"] if command else ["--help"]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_manual_page_of_80_columns(command, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = pages(capfd, command)
    assert page.startswith(f"Usage: ratecluster {command} ")
    heads = re.findall(r"^(\w[\w ]*):$", page, re.MULTILINE)
    assert [h for h in heads if h not in ("Settings", "Arguments")] == [
        *("Reads", "Writes", "Options", "Exit codes", "Examples")
    ]
    assert max(map(len, page.splitlines())) <= 80
    assert all(len(page.split(f"\n{head}:\n")[1].split("\n\n")[0]) > 5 for head in heads)


def test_all_settings_stand_on_some_page(capfd):
    shown = "".join(pages(capfd, command) for command in COMMANDS)
    for name, _, _ in config.describe(options.KINDS):
        assert f"  {name} " in shown


def examples(page: str) -> list[list[str]]:
    """The command lines of the last block; those that go on are indented."""
    lines = page.split("\nExamples:\n")[1].splitlines()
    text = re.sub(r"\n +(?=--)", " ", "\n".join(line.removeprefix("  ") for line in lines))
    return [shlex.split(line.partition(" > ")[0]) for line in text.splitlines() if line]


def parsed(words: list[str]) -> None:
    """Fails where a command line names a command or an option that there is not."""
    assert words[0] == "ratecluster"
    if words[1] in GROUP.commands:
        context = typer.Context(GROUP, info_name="ratecluster")
        if "--help" not in words:
            GROUP.commands[words[1]].make_context(words[1], words[2:], parent=context)
    else:
        assert words[1:] in (["--help"], ["--install-completion"], ["--show-completion"]), words


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_examples_are_commands_that_there_are(command, capfd):
    found = examples(pages(capfd, command))
    assert found
    for words in found:
        parsed(words)
        assert not command or words[1] == command
        sets = [value for name, value in pairwise(words) if name == "--set"]
        config.load(options.KINDS, None, sets)


def test_needed_options_stand_in_the_usage(capfd):
    assert pages(capfd, "embed").startswith(
        "Usage: ratecluster embed --shards SHARDS --root URL [OPTIONS]\n"
    )


def test_a_docstring_is_a_page():
    about, blocks = help_pages.page("""First.

    Second: not
    a block.

    Reads:
      a   b
        c

      d
    Exit codes:
      0  good
    """)
    assert about == "First.\n\nSecond: not\na block."
    assert blocks == {"Reads": ["a   b", "  c", "", "d"], "Exit codes": ["0  good"]}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["embbed"], "No such command 'embbed'. Did you mean 'embed'?; see ratecluster --help"),
        (["embed", "--rot", "x"], "see ratecluster embed --help"),
        (["embed", "--rot", "x"], "--root"),
        (["--jsn", "status"], "--json"),
        (["status"], "Missing option '--root'; see ratecluster status --help"),
    ],
)
def test_mistakes_come_with_a_hint(words, said, capfd):
    assert cli.invoke(words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


# ---- completion, asked as the shells ask


def asked(shell: str, words: str) -> set[str]:
    """What is offered for the last of the words, which may be empty."""
    count = len(words.split(" "))
    env = os.environ | {"PYTHONPATH": str(ROOT), "_RATECLUSTER_COMPLETE": f"complete_{shell}"}
    env |= {"COMP_WORDS": words, "COMP_CWORD": str(count - 1)}  # bash
    env |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(
        [sys.executable, "-m", "pipeline"], env=env, capture_output=True, text=True, check=True
    )
    if shell == "zsh":
        return set(re.findall(r'"([^"]+)":?', done.stdout)[:: 2 if ":" in done.stdout else 1])
    return {line.partition("\t")[0] for line in done.stdout.splitlines() if line}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_commands_are_completed(shell):
    assert asked(shell, "ratecluster s") == {c for c in COMMANDS if c.startswith("s")}


def test_options_and_settings_are_completed():
    assert asked("bash", "ratecluster embed --s") == {"--shards", "--set"}
    assert asked("bash", "ratecluster run --set write.") == {"write.shards=", "write.exclude="}


def test_all_settings_can_be_completed():
    names = [f"{name}=" for name, _, _ in config.describe(options.KINDS)]
    assert options.completed("") == names
    assert options.completed("select_k.k_") == ["select_k.k_min=", "select_k.k_max="]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_a_shell_asks_us(shell, tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    command = [sys.executable, "-m", "pipeline"]
    shown = subprocess.run(
        [*command, "--show-completion", shell], env=env, capture_output=True, text=True, check=True
    ).stdout
    assert "_RATECLUSTER_COMPLETE" in shown and "ratecluster" in shown
    subprocess.run(
        [*command, "--install-completion", shell], env=env, capture_output=True, check=True
    )
    written = [p.read_text() for p in tmp_path.rglob("*") if p.is_file()]
    assert any("_RATECLUSTER_COMPLETE" in text for text in written)


BASH = """
eval "$(ratecluster --show-completion bash)"
COMP_WORDS=(ratecluster run --set write.)
COMP_CWORD=3
$(complete -p ratecluster | sed 's/.*-F \\([^ ]*\\) .*/\\1/') ratecluster
echo "${COMPREPLY[@]}"
"""


def test_a_real_bash_completes(tmp_path):
    script = tmp_path / "ratecluster"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m pipeline "$@"\n')
    script.chmod(0o755)
    env = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"
    done = subprocess.run(["bash", "-c", BASH], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "write.shards= write.exclude=\n", done.stderr


# ---- how soon

LOADED = """
import sys
from pipeline.__main__ import main
try:
    main()
except SystemExit:
    pass
print(*sys.modules, file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--help"], {}),
        (["embbed"], {}),
        (
            [],
            {
                "_RATECLUSTER_COMPLETE": "complete_bash",
                "COMP_WORDS": "ratecluster run --set ",
                "COMP_CWORD": "3",
            },
        ),
    ],
    ids=["help", "mistake", "completion"],
)
def test_what_does_no_work_imports_nothing_heavy(words, environment):
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    modules = set(done.stderr.splitlines()[-1].split())
    assert "pipeline.commands" in modules and not modules & HEAVY


@pytest.mark.parametrize("command", ["status", "report", "evaluate"])
def test_rooms_entered_late_are_entered_whole(command, tmp_path):
    """By the first that is used, whatever its imports look into."""
    paths = fake_run.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", command, "--root", paths.root, "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["root"] == paths.root


def test_the_console_script_is_that_door():
    assert 'ratecluster = "pipeline.__main__:main"' in Path(ROOT, "pyproject.toml").read_text()
