"""Text for a terminal: wrapped lines, and columns of a table."""

import math
import textwrap
from collections.abc import Sequence
from datetime import timedelta

from pipeline.runtime.reject_reasons import printable

WIDTH = 100  # columns of the longest line


def filled(line: str, hanging: int = 8) -> str:
    """A line wrapped to at most WIDTH columns; its later lines are indented by `hanging` more."""
    indent = " " * (len(line) - len(line.lstrip()) + hanging)
    text = printable(line)
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False)


def table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Rows of equal length as lines; the first `left` columns are flush left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = list(map(str.ljust, row[:left], widths))
        cells += map(str.rjust, row[left:], widths[left:])
        lines.append("  ".join(cells).rstrip())
    return lines


def digits(value: float) -> str:
    """To three digits, without an exponent."""
    if value >= 100 or not value:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:01:30."""
    return str(timedelta(seconds=round(seconds)))
