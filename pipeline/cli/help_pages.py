"""Commands whose help is a manual page, which all have --quiet and --json.

A command's docstring is its page: what it does, then blocks such as `Reads:` with indented lines,
that are shown as they stand. `Settings:` names sections of the configuration, and their settings
are listed in its place; `Exit codes:` is the same for all that do not say otherwise.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.runtime import cluster, config, console

BLOCK = re.compile(r"^(\w[\w ]*):\n((?:[ ]+\S.*\n?|\n(?=[ ]))+)", re.MULTILINE)
FIRST = ("Reads", "Writes")  # blocks before the options
LAST = ("Settings", "Environment", "Exit codes", "Examples")
APART = ("shards", "index")  # sections that `run` does not go by
EXIT_CODES = """\
0  everything asked for was done, or was done already
1  it failed or was interrupted: the same command again goes on
2  a mistake in the command, a setting or a path: nothing was made"""

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="say errors and the result only", callback=console.hush),
]
Json = Annotated[
    bool, typer.Option("--json", help="the result as one JSON object", callback=console.as_json)
]
Kinds = Mapping[str, type]  # section -> its Config


def page(text: str) -> tuple[str, dict[str, list[str]]]:
    """What a docstring says before its blocks, and the lines of each block."""
    text = inspect.cleandoc(text)
    blocks = {
        title: inspect.cleandoc(f"\n{body}").split("\n") for title, body in BLOCK.findall(text)
    }
    return BLOCK.sub("", text).strip(), blocks


class _Manual:
    """`format_help` of commands and of the group."""

    kinds: Kinds

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        about, blocks = page(self.help or "")
        blocks.setdefault("Exit codes", EXIT_CODES.split("\n"))
        self.format_usage(ctx, formatter)
        for paragraph in about.split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(" ".join(paragraph.split()))
        for title in FIRST:
            self.write(title, blocks, formatter)
        self.format_options(ctx, formatter)
        for title in LAST:
            self.write(title, blocks, formatter)

    def write(self, title: str, blocks: dict[str, list[str]], formatter: Any) -> None:
        if title not in blocks:
            return
        with formatter.section(title):
            if title == "Settings":
                sections = ", ".join(blocks[title]).replace(" ", "").split(",")
                formatter.write_text("[default]; for --set SECTION.KEY=VALUE or the TOML file")
                formatter.write_dl(self.settings(sections), col_max=28)
                return
            for line in blocks[title]:
                formatter.write(f"{'':{formatter.current_indent}}{line}".rstrip() + "\n")

    def settings(self, sections: list[str]) -> list[tuple[str, str]]:
        if sections == ["all"]:
            sections = [name for name in self.kinds if name not in APART]
        rows = config.describe({name: self.kinds[name] for name in sections})
        return [(name, f"{help} [{default}]") for name, default, help in rows]


class Command(_Manual, TyperCommand):
    """A command with a page; what it needs is in the first line of it."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        needed = [p for p in self.params if p.required and p.param_type_name == "option"]
        pieces = [f"{p.opts[0]} {p.metavar or p.name.upper()}" for p in needed]
        return [*pieces, *super().collect_usage_pieces(ctx)]


class Group(_Manual, TyperGroup):
    """All commands."""


class App(typer.Typer):
    """A typer app whose commands have pages, `--quiet` and `--json`, and leave Ray at their end."""

    def __init__(self, kinds: Kinds, **settings: Any) -> None:
        _Manual.kinds = kinds
        super().__init__(cls=Group, rich_markup_mode=None, **settings)
        self.callback()(_common)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """As typer's."""
        put = super().command(name, cls=Command, **settings)
        return lambda function: put(_speaking(function))


def _common(quiet: Quiet = False, json: Json = False) -> None:
    """The same options before the command."""


def _speaking(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with two options more, in a session of Ray."""

    @functools.wraps(function)
    def command(**given: Any) -> Any:
        del given["quiet"], given["json"]
        with cluster.session():
            return function(**given)

    signature, more = inspect.signature(function), inspect.signature(_common)
    parameters = [*signature.parameters.values(), *more.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {**function.__annotations__, **_common.__annotations__}
    return command
