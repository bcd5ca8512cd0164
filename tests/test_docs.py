"""The documentation builds without a warning, fetches nothing, and names what there is."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.artifacts import schemas, stages
from pipeline.cli import main as cli
from pipeline.cli import options
from pipeline.runtime import config
from pipeline.runtime.reject_reasons import Reason
from tests.cli.test_help_pages import COMMANDS, parsed
from tests.conftest import BUNDLED, FEW_WORDS, ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
JOB = "python -m jobs."
FETCHED = re.compile(
    r"<(?:link|script|img|source|iframe)\b[^>]*?(?:href|src)=\"?((?:https?:)?//[^\s\">]+)"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The whole site, built as CI does."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # material's word on its own future
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    message = done.stdout + done.stderr
    assert done.returncode == 0 and "WARNING" not in message, message
    return folder


def test_it_builds_and_every_page_is_there(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS).with_suffix(".html")).exists()


def test_nothing_is_fetched_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert not FETCHED.findall(page.read_text()), page
    for style in site.rglob("*.css"):
        assert "url(http" not in style.read_text() and "@import" not in style.read_text()


def test_every_command_setting_column_and_reason_has_its_place(site):
    commands = text(site / "reference" / "commands.html")
    assert all(f"Usage: ratecluster {name} " in commands for name in COMMANDS)
    settings = text(site / "reference" / "settings.html")
    assert all(name in settings for name, _, _ in config.describe(options.KINDS))
    files = text(site / "reference" / "files.html")
    for schema in vars(schemas).values():
        if isinstance(schema, pa.Schema):
            assert all(name in files for name in schema.names)
    assert all(reason.value in files for reason in Reason)
    folders = [stage.folder for stage in stages.chain()]
    assert all(f"my-run/{folder}/" in files for folder in folders)


def text(page: Path) -> str:
    return re.sub(r"<[^>]+>", "", page.read_text())


def test_every_column_has_a_meaning():
    from tools import docs_hook

    for line in docs_hook.files().splitlines():
        assert not re.search(r"\|\s*\|$", line), line


# ---- command lines


def command_lines(page: Path) -> list[str]:
    """Of code blocks, fenced or indented; lines that go on are joined."""
    source = page.read_text().replace("\\\n", " ")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", source, re.MULTILINE | re.DOTALL))
    indented = [line for line in source.splitlines() if line.startswith("    ")]
    lines = [line.strip().removeprefix("$ ") for line in (*fenced.splitlines(), *indented)]
    return [line for line in lines if line.startswith("ratecluster ") or JOB in line]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_command_lines_are_of_commands_that_there_are(page):
    for line in command_lines(page):
        words = shlex.split(line.partition("  #")[0])
        if JOB in line:
            module, *given = words[words.index("-m") + 1 :]
            name = module.removeprefix("jobs.")
            words = ["ratecluster", "run" if name == "all" else name.replace("_", "-"), *given]
        parsed(words)
        sets = [value for name, value in pairwise(words) if name == "--set"]
        file = next((value for name, value in pairwise(words) if name == "--config"), None)
        assert file is None or (ROOT / file).exists() or "/" not in file, file
        config.load(options.KINDS, None, sets)


def test_there_are_command_lines():
    assert sum(len(command_lines(page)) for page in PAGES) > 25
    assert len(command_lines(DOCS / "tutorial.md")) == 9


@pytest.mark.slow
@pytest.mark.ray
def test_the_tutorial_works(tmp_path, monkeypatch, ray_session, capfd):
    """Every command of it in order, on one of the shards, with few steps."""
    shards = tmp_path / "examples" / "noto-emoji"
    shards.mkdir(parents=True)
    shutil.copy(BUNDLED / "00003.tar", shards)
    monkeypatch.chdir(tmp_path)
    for line in command_lines(DOCS / "tutorial.md"):
        _, *words = shlex.split(line)
        if words[0] in ("run", "plan", "status"):
            words += ["--set", "train.steps=12", *FEW_WORDS]
        assert cli.invoke(words) == 0, line
        message = capfd.readouterr().out
    assert (
        json.loads(message)["samples"] == 411 and (tmp_path / "my-run/report/index.html").exists()
    )
