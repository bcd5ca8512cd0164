"""Commands whose help is one readable page, and which all have --quiet and --json.

The docstring of a command is its page and is shown as it is, so its lines have at most 78 columns.
Its last line may be `Settings: embed, run`: the page then ends with the settings of these sections.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
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
                formatter.write_dl(self.settings(sections.split(", ")), col_max=32)

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

    def add(self, *functions: Callable[..., Any]) -> None:
        """Add commands in this order: `select_k_command` becomes `select-k`."""
        for function in functions:
            name = function.__name__.removesuffix("_command").replace("_", "-")
            self.command(name, cls=Command)(_expanded(function))


def _common(quiet: Quiet = False, json: Json = False) -> None:
    """The same options before the command."""


def _expanded(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as typer can read it; it runs in a session of Ray.

    A parameter whose type is a dataclass is replaced by the fields, each an option. --quiet and
    --json are added.
    """
    parameters, groups = list[inspect.Parameter](), dict[str, Any]()
    for parameter in [*_parameters(function), *_parameters(_common)]:
        kind: Any = parameter.annotation
        if is_dataclass(kind):
            groups[parameter.name] = kind
        parameters += _parameters(kind) if is_dataclass(kind) else [parameter]

    @functools.wraps(function)
    def command(**values: Any) -> Any:
        del values["quiet"], values["json"]  # their callbacks have applied them
        for name, kind in groups.items():
            values[name] = kind(**{f.name: values.pop(f.name) for f in fields(kind)})
        with cluster.session():
            return function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _parameters(function: Any) -> list[inspect.Parameter]:
    found = inspect.signature(function).parameters.values()
    return [parameter.replace(kind=parameter.KEYWORD_ONLY) for parameter in found]
