"""Commands whose help is one readable page, and which all have --quiet and --json.

The docstring of a command is its page and is shown as it is, so its lines have at most 78 columns.
Its last line may be `Settings: embed, run`: the page then ends with the settings of these sections.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from pipeline.runtime import cluster, config, console

SETTINGS = "\nSettings: "
NOT_OF_RUN = ("shards", "index")  # sections that `run` does not use
EXIT_CODES = """\
Exit codes:
  0  finished, or there was nothing left to do
  1  failed or interrupted (run the same command again to resume)
  2  a mistake in the command, a setting or a path; nothing was written"""

Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", help="print only errors and the result", callback=console.be_quiet
    ),
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print the result as one JSON object", callback=console.use_json),
]
Kinds = Mapping[str, type]  # section -> its Config


class _Page:
    """`format_help` of the commands and of the group."""

    kinds: Kinds

    def format_help(self: Any, ctx: Any, formatter: Any) -> None:
        text, _, sections = inspect.cleandoc(self.help).partition(SETTINGS)
        exit_codes = "" if "\nExit codes:" in text else f"\n{EXIT_CODES}\n"
        self.format_usage(ctx, formatter)
        formatter.write(f"\n{text.rstrip()}\n")
        self.format_options(ctx, formatter)
        formatter.write(exit_codes)
        if sections:
            with formatter.section("Settings"):
                formatter.write_text("[default]; for --set SECTION.KEY=VALUE or the TOML file")
                formatter.write_dl(self.settings(sections.split(", ")), col_max=28)

    def settings(self, sections: list[str]) -> list[tuple[str, str]]:
        if sections == ["all"]:
            sections = [name for name in self.kinds if name not in NOT_OF_RUN]
        rows = config.describe({name: self.kinds[name] for name in sections})
        return [(name, f"{help} [{default}]") for name, default, help in rows]


class Command(_Page, TyperCommand):
    """A command with a page; its usage line names the required options."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        needed = [p for p in self.params if p.required and p.param_type_name == "option"]
        pieces = [f"{p.opts[0]} {p.metavar or p.name.upper()}" for p in needed]
        return [*pieces, *super().collect_usage_pieces(ctx)]


class Group(_Page, TyperGroup):
    """All commands."""


class App(typer.Typer):
    """A typer app whose commands have pages, --quiet and --json, and leave Ray at their end."""

    def __init__(self, kinds: Kinds, **settings: Any) -> None:
        _Page.kinds = kinds
        super().__init__(cls=Group, rich_markup_mode=None, **settings)
        self.callback()(_common)

    def command(self, name: str | None = None, **settings: Any) -> Callable[..., Any]:
        """As typer's."""
        add = super().command(name, cls=Command, **settings)
        return lambda function: add(_with_common(function))


def _common(quiet: Quiet = False, json: Json = False) -> None:
    """The same options before the command."""


def _with_common(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with --quiet and --json; it runs in a session of Ray."""

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        del values["quiet"], values["json"]  # their callbacks have applied them
        with cluster.session():
            return function(**values)

    signature, more = inspect.signature(function), inspect.signature(_common)
    parameters = [*signature.parameters.values(), *more.parameters.values()]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {**function.__annotations__, **_common.__annotations__}
    return command
