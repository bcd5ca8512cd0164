"""The commands that look things up in a run."""

from typing import Annotated

import typer
from rich.console import Console

from pipeline.errors import UserError
from pipeline.options import Address, ConfigFile, Overrides, Root, begin, owning, settings_help
from pipeline.store import storage
from pipeline.use import index, pages, serve
from pipeline.use.index import Space
from pipeline.use.search import Search

STRIP = "ratecluster-search.html"
SpaceOption = Annotated[
    Space,
    typer.Option(help="clip: the encoder's embeddings; z: what the trained network makes of them"),
]


def add(app: typer.Typer) -> None:
    """Put them beside the stages' commands."""
    app.command("index", epilog=settings_help("index", "run"))(index_command)
    app.command("search")(search_command)
    app.command("serve")(serve_command)


def index_command(
    root: Root,
    space: SpaceOption = Space.CLIP,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """A FAISS index of a run, for search and serve, below its root.

    Needs a finished embed, for the space z a finished train. Fewer than index.flat_below samples
    are kept as they are and compared one by one; more are compressed (IVF-PQ), trained on a sample,
    and search compares the best candidates again as they are. A part that is there is not made
    again.
    """
    sections, paths = begin(root, config_file, sets, address)
    with owning(paths.root, sections["run"]):
        index.run(sections["index"], paths, space)


def search_command(
    root: Root,
    image: Annotated[str | None, typer.Option(help="a picture's file, or its URL")] = None,
    text: Annotated[str | None, typer.Option(help="words, as they are")] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="how many samples")] = 20,
    cluster: Annotated[int | None, typer.Option(help="look in this cluster alone")] = None,
    space: SpaceOption = Space.CLIP,
    html: Annotated[
        str | None, typer.Option(help=f"file for the strip of pictures [{STRIP}; --json: none]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, a list of objects")] = False,
) -> None:
    """The samples most like a picture or a text: a table, and a strip of pictures as HTML.

    Needs a run that has captions, and `ratecluster index` of the same space. Scores are cosines.
    Texts are found in the space clip alone. --cluster reads all parts of the assignments once.
    """
    if (image is None) == (text is None):
        raise UserError("give either --image or --text")
    if text is not None and space is Space.Z:
        raise UserError(
            "--space z is of pictures alone: the network was trained on embeddings of images, and "
            "CLIP puts texts elsewhere; look for texts in --space clip"
        )
    _, paths = begin(root, None, None, None)
    search = Search(paths, [space])
    if text is not None:
        query = search.of_text(text)
    else:
        query = search.of_image(_picture(str(image)), space, search.max_pixels)
    hits = search.nearest(query, space, top, cluster)
    if as_json:
        typer.echo(pages.as_json(hits))
    else:
        Console().print(pages.as_table(hits))
    if html or not as_json:
        url = storage.absolute(html or STRIP)
        shown = pages.pictured(hits, search.max_pixels)
        title = f"Most like “{text}”" if text is not None else "Most like the picture"
        storage.write_bytes(url, pages.page(title, note=paths.root, hits=shown).encode())
        typer.echo(f"pictures: {url}", err=as_json)


def serve_command(
    root: Root,
    host: Annotated[
        str, typer.Option(help="address to listen on; others than loopback have no password")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
) -> None:
    """A web page for searching a run by text or picture and for browsing its clusters.

    Needs what search needs. Pictures are read from the input shards. Ctrl-C ends it.
    """
    _, paths = begin(root, None, None, None)
    serve.run(paths, host, port, typer.echo)


def _picture(url: str) -> bytes:
    try:
        return storage.read_bytes(storage.absolute(url))
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error.strerror or error}; check --image") from None
