"""Configuration: frozen dataclasses, one per stage, filled from one TOML file. Knows no stage."""

import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, field, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipeline.runtime.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found,unused-ignore]

Sections = dict[str, Any]  # stage name -> its Config
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


def setting(default: Any, help: str, *, operational: bool = False, added: bool = False) -> Any:
    """A field of a stage's Config, with a help text that names its unit.

    `operational` settings change how the work is done but not the result, such as the number of
    actors. They are not part of the fingerprint. Neither are `added` settings at their default,
    which an earlier version did not have: what it made stays valid.
    """
    metadata = {"help": help, "operational": operational, "added": added}
    return field(default=default, metadata=metadata)


def load(kinds: Mapping[str, type], path: str | None, overrides: Sequence[str] = ()) -> Sections:
    """Fill each stage's Config from its table in the TOML file, then from `section.key=value`.

    Raises UserError for an unreadable file, an unknown section or key (naming the nearest known
    one), and a value of the wrong type.
    """
    tables = _read(path) if path else {}
    for text in overrides:
        section, key, value = _split(text, kinds)
        tables.setdefault(section, {})[key] = value
    return fill(kinds, tables)


def fill(kinds: Mapping[str, type], tables: Mapping[str, Any]) -> Sections:
    """Fill each stage's Config from a mapping of its settings. Raises UserError as `load` does."""
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise UserError(f"{name} = {table!r}: give the settings of [{name}] by their names")
    if unknown := tables.keys() - kinds.keys():
        name = min(unknown)
        raise UserError(f"unknown section [{name}]{_nearest(name, kinds)}")
    return {name: _fill(kind, name, tables.get(name, {})) for name, kind in kinds.items()}


def fingerprint(cfg: Any, *upstream: object) -> str:
    """Twelve hex digits that change when a setting that matters or anything upstream changes."""
    return digest(facts(cfg), *upstream)


def digest(settings: Mapping[str, Any], *upstream: object) -> str:
    """The fingerprint of settings in the form of a manifest."""
    text = json.dumps([settings, *upstream], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def facts(cfg: Any) -> dict[str, Any]:
    """The settings that decide the result, as JSON values."""
    left_out = {
        f.name
        for f in fields(cfg)
        if f.metadata.get("operational")
        or (f.metadata.get("added") and getattr(cfg, f.name) == f.default)
    }
    values = {key: value for key, value in asdict(cfg).items() if key not in left_out}
    return typing.cast(dict[str, Any], json.loads(json.dumps(values)))


def differences(section: str, before: Mapping[str, Any], cfg: Any) -> str:
    """The settings of a stage that differ from `before`, for a message."""
    added = {f.name: f.default for f in fields(cfg) if f.metadata.get("added")}
    defaults = json.loads(json.dumps(added))
    was, now = {**defaults, **before}, {**defaults, **facts(cfg)}
    changed = [key for key in now if was.get(key) != now[key]]
    return ", ".join(f"{section}.{key} was {was.get(key)!r}, is {now[key]!r}" for key in changed)


def as_made(cfg: Any, made_with: Mapping[str, Any]) -> Any:
    """`cfg` with the settings that a manifest records."""
    own = {f.name for f in fields(cfg) if not f.metadata.get("operational")}
    known = {key: value for key, value in made_with.items() if key in own}
    return replace(cfg, **{k: tuple(v) if isinstance(v, list) else v for k, v in known.items()})


def describe(kinds: Mapping[str, type]) -> list[tuple[str, str, str]]:
    """(section.key, default, help) of every setting, for --help and the documentation."""
    return [
        (f"{section}.{f.name}", json.dumps(f.default), f.metadata["help"])
        for section, kind in kinds.items()
        for f in fields(kind)
    ]


def _read(path: str) -> dict[str, dict[str, Any]]:
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config {path} cannot be read: {error.strerror}; check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"config {path} is not valid TOML: {error}") from None
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise UserError(f"config {path}: {name} is outside a section; put it below [stage]")
    return tables


def _split(text: str, kinds: Mapping[str, type]) -> tuple[str, str, Any]:
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise UserError(f"--set {text}: write it as section.key=value, such as embed.batch_size=64")
    if section not in kinds:
        raise UserError(f"--set {text}: unknown section {section}{_nearest(section, kinds)}")
    try:
        return section, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return section, key, value.strip()  # a bare word is a string: embed.model=ViT-L-14


def _fill(kind: type, section: str, table: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    known = [f.name for f in fields(kind)]
    for key in table:
        if key not in known:
            raise UserError(f"unknown setting {section}.{key}{_nearest(key, known)}")
    return kind(**{key: _cast(v, hints[key], f"{section}.{key}") for key, v in table.items()})


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(names)}"


def _cast(value: Any, kind: Any, name: str) -> Any:
    """`value` as `kind`: int, float, bool, str, tuple[str, ...] or one of these or None."""
    if typing.get_origin(kind) is types.UnionType:
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        values = value if isinstance(value, list | tuple) else [value]
        return tuple(_cast(v, item, name) for v in values)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name} = {value!r}: give {WORDS[kind]}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} = {value}: give a finite number")
    return value
