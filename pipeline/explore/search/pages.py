"""What a search has found: for a terminal, as JSON, as a page; its texts are the web's."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.explore.search.search import Hit
from pipeline.runtime.reject_reasons import printable
from pipeline.vision import thumbnails

LONGEST = 120  # characters of a text in a table
SIDE = 192  # pixels of a thumbnail's longer side


def text(hits: Sequence[Hit]) -> str:
    """A table as wide as the terminal; nothing in it steers that or is taken for markup."""
    table = Table(box=None, pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("sample", overflow="fold", no_wrap=True)  # the others give way to it
    table.add_column("cluster", overflow="fold")
    table.add_column("alt text", overflow="fold")
    for hit in hits:
        cluster = f"{hit.cluster_id} {hit.cluster_caption}"
        texts = (hit.sample_id, cluster[:LONGEST], hit.caption[:LONGEST])
        table.add_row(f"{hit.score:.3f}", *(Text(printable(text)) for text in texts))
    console = Console(no_color=True, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def facts(hits: Sequence[Hit]) -> list[dict[str, Any]]:
    """For a script, best first."""
    rows = []
    for hit in hits:
        url, offset, size = hit.place
        row = {name: value for name, value in asdict(hit).items() if name != "place"}
        rows.append({**row, "shard_url": url, "tar_offset": offset, "tar_size": size})
    return rows


def pictured(hits: Sequence[Hit], max_pixels: int) -> list[tuple[Hit, str | None]]:
    """Each with its thumbnail as a data: URI; None where the picture cannot be read any more."""
    found = thumbnails.thumbnails([hit.place for hit in hits], max_pixels, SIDE)
    return list(zip(hits, found, strict=True))


def page(title: str, **facts: Any) -> str:
    """The page of a search; whatever is put into it is escaped, and unseen characters are spelt."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    template = resources.files("pipeline.explore.search").joinpath("page.html").read_text("utf-8")
    return environment.from_string(template).render(title=title, **facts)


def _visible(value: Any) -> Any:
    plain = isinstance(value, str) and not isinstance(value, Markup)
    return printable(value) if plain else value
