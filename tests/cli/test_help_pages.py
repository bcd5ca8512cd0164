"""Help pages, completion, and what light commands import."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise

import pytest
import typer

from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.runtime import config
from tests import fake_run
from tests.conftest import ROOT, run_arguments

GROUP = typer.main.get_command(cli.app)
COMMANDS = sorted(GROUP.commands)
HEAVY = {"torch", "ray", "sklearn", "scipy", "pandas", "open_clip", "faiss", "PIL"}
TAB = {"COMP_WORDS": "ratecluster run --set ", "COMP_CWORD": "3"}


def pages(capfd, command: str) -> str:
    assert cli.invoke([command, "--help"] if command else ["--help"]) == 0
    return capfd.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_help_page_of_80_columns(command, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    page = pages(capfd, command)
    assert page.startswith(f"Usage: ratecluster {command} ")
    heads = re.findall(r"^(\w[\w ]*):$", page, re.MULTILINE)
    blocks = [head for head in heads if head not in ("Settings", "Arguments")]
    order = ["Reads", "Writes", "Examples", "Options", "Exit codes"]
    assert blocks == order if command != "verify" else sorted(blocks) == sorted(order)
    assert max(map(len, page.splitlines())) <= 80
    assert all(len(page.split(f"\n{head}:\n")[1].split("\n\n")[0]) > 5 for head in heads)


def test_all_settings_are_on_some_page(capfd):
    shown = "".join(pages(capfd, command) for command in COMMANDS)
    for name, _, _ in config.describe(options.KINDS):
        assert f"  {name} " in shown


def examples(page: str) -> list[list[str]]:
    """The command lines of the last block; continued lines are indented."""
    lines = page.split("\nExamples:\n")[1].split("\n\n")[0].splitlines()
    text = re.sub(r"\n +(?=--)", " ", "\n".join(line.removeprefix("  ") for line in lines))
    return [shlex.split(line.partition(" > ")[0]) for line in text.splitlines() if line]


def parsed(words: list[str]) -> None:
    """Fails where a command line names an unknown command or option."""
    assert words[0] == "ratecluster"
    if words[1] in GROUP.commands:
        context = typer.Context(GROUP, info_name="ratecluster")
        if "--help" not in words:
            GROUP.commands[words[1]].make_context(words[1], words[2:], parent=context)
    else:
        assert words[1:] in (["--help"], ["--install-completion"], ["--show-completion"]), words


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_examples_are_valid_commands(command, capfd):
    found = examples(pages(capfd, command))
    assert found
    for words in found:
        parsed(words)
        assert not command or words[1] == command
        sets = [value for name, value in pairwise(words) if name == "--set"]
        config.load(options.KINDS, None, sets)


def test_required_options_are_in_the_usage(capfd):
    assert pages(capfd, "embed").startswith(
        "Usage: ratecluster embed --shards SHARDS --root URL [OPTIONS]\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embbed"], "No such command 'embbed'. Did you mean 'embed'?; see ratecluster --help"),
        (["embed", "--rot", "x"], "see ratecluster embed --help"),
        (["embed", "--rot", "x"], "--root"),
        (["--jsn", "status"], "--json"),
        (["status"], "Missing option '--root'; see ratecluster status --help"),
    ],
)
def test_mistakes_come_with_a_hint(words, message, capfd):
    assert cli.invoke(words) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


# ---- completion, with the variables that shells set


def complete(shell: str, words: str) -> set[str]:
    """The completions of the last word, which may be empty."""
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
    assert complete(shell, "ratecluster s") == {c for c in COMMANDS if c.startswith("s")}


def test_options_and_settings_are_completed():
    assert complete("bash", "ratecluster embed --s") == {"--shards", "--set"}
    assert complete("bash", "ratecluster run --set write.") == {"write.shards=", "write.exclude="}


def test_all_settings_can_be_completed():
    names = [f"{name}=" for name, _, _ in config.describe(options.KINDS)]
    assert options.complete_set("") == names
    assert options.complete_set("select_k.k_") == ["select_k.k_min=", "select_k.k_max="]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_for_a_shell_calls_ratecluster(shell, tmp_path):
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


# ---- imports: they decide how fast a command starts

LOADED = """
import sys
from pipeline.cli.main import main
try:
    main()
except SystemExit as ended:
    code = ended.code
print(code, *sys.modules, file=sys.stderr)
"""


def imports(words: list[str], environment: dict[str, str]) -> tuple[int, set[str]]:
    """Exit code of a command in a process of its own, and the modules it imported."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    code, *modules = done.stderr.splitlines()[-1].split()
    assert "pipeline.cli.commands" in modules
    return int(code), {name.partition(".")[0] for name in modules}


@pytest.mark.parametrize(
    ("words", "environment", "code"),
    [
        (["--help"], {}, 0),
        (["run", "--help"], {}, 0),
        (["embbed"], {}, 2),
        ([], {"_RATECLUSTER_COMPLETE": "complete_bash", **TAB}, 0),
    ],
    ids=["help", "help of a command", "mistake", "completion"],
)
def test_what_does_no_work_imports_nothing_heavy(words, environment, code):
    ended, modules = imports(words, environment)
    assert ended == code and not modules & HEAVY


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return fake_run.build(tmp_path_factory.mktemp("fake")).root


def test_status_imports_nothing_heavy(root):
    ended, modules = imports(["status", "--root", root], {})
    assert ended == 0 and not modules & HEAVY


@pytest.mark.ray
def test_a_run_with_nothing_left_to_do_starts_no_stage(finished_run, tiny_shards):
    ended, modules = imports(run_arguments(tiny_shards, finished_run), {})
    assert ended == 0 and not modules & {"torch", "ray", "open_clip", "faiss"}
