"""Search results as a table for a terminal, as JSON, and as a page. Their texts are untrusted."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.explore.search.search import Hit
from pipeline.runtime import templates
from pipeline.runtime.reject_reasons import printable
from pipeline.vision import thumbnails

LONGEST = 120  # characters of a text in a table
SIDE = 192  # pixels of a thumbnail's longer side
NOTHING: dict[str, Any] = dict.fromkeys(
    ("site", "query", "alert", "note", "hits", "clusters", "number", "last")
)  # values of page.html that a page may lack


def text(hits: Sequence[Hit]) -> str:
    """A table as wide as the terminal, without control characters or markup from the texts."""
    table = Table(box=None, pad_edge=False)
    table.add_column("score", justify="right")
    table.add_column("sample", overflow="fold", no_wrap=True)  # the other columns shrink first
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
    """Results as JSON values, best first."""
    rows = []
    for hit in hits:
        url, offset, size = hit.place or (None, None, None)
        row = {name: value for name, value in asdict(hit).items() if name != "place"}
        rows.append({**row, "shard_url": url, "tar_offset": offset, "tar_size": size})
    return rows


def with_thumbnails(hits: Sequence[Hit], max_pixels: int) -> list[tuple[Hit, str | None]]:
    """Each result with its thumbnail as a data: URI; None if the image is no longer readable."""
    places = [hit.place for hit in hits if hit.place]
    found = iter(thumbnails.thumbnails(places, max_pixels, SIDE))
    return [(hit, next(found) if hit.place else None) for hit in hits]


def page(title: str, **values: Any) -> str:
    """The page of a search. Every value is escaped, and invisible characters are written out."""
    template = resources.files("pipeline.explore.search").joinpath("page.html").read_text("utf-8")
    return templates.environment().from_string(template).render({"title": title} | NOTHING | values)
