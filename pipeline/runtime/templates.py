"""Jinja2 templates: one environment, in which every value passes through `finalize`."""

import re
from collections.abc import Callable
from typing import Any

import jinja2
from markupsafe import Markup

# Control characters, zero-width characters, marks and overrides of direction, lone surrogates.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff]"
)


def visible(value: Any) -> Any:
    """Write invisible characters as code points such as ⟨U+202E⟩, also in lists and dicts."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return UNSEEN.sub(lambda match: f"⟨U+{ord(match.group()):04X}⟩", value)
    if isinstance(value, dict):
        return {key: visible(item) for key, item in value.items()}
    return [visible(item) for item in value] if isinstance(value, list) else value


def environment(
    finalize: Callable[[Any], Any] = visible, *, autoescape: bool = True
) -> jinja2.Environment:
    """An environment for HTML, or with `autoescape=False` for other text.

    A template that uses an undefined name raises jinja2.UndefinedError.
    """
    made = jinja2.Environment(
        autoescape=autoescape,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    made.filters["number"] = lambda value: f"{value:,}"
    return made
