"""The commands that look things up in a run. What each says is its manual page."""

import sys
from typing import Annotated

import typer

from pipeline.artifacts.layout import Space
from pipeline.cli.help_pages import App
from pipeline.cli.options import Address, ConfigFile, Overrides, Root, begin, owning
from pipeline.explore.search import index, pages, search, serve
from pipeline.runtime import console
from pipeline.runtime.errors import UserError
from pipeline.store import storage

STRIP = "ratecluster-search.html"
SpaceOption = Annotated[
    Space,
    typer.Option(help="clip: the encoder's embeddings; z: what the trained network makes of them"),
]


def index_command(
    root: Root,
    space: SpaceOption = Space.CLIP,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """A FAISS index of a run, for search and serve.

    Fewer than index.flat_below samples are kept as they are and compared one by one; more are
    compressed (IVF-PQ), trained on a sample, and search compares the best candidates again as
    they are. A part that is there is not made again.

    Reads:
      {root}/embeddings/                 all parts
      {root}/network/                    for --space z
    Writes:
      {root}/index/{space}/              what is trained, a file per run of parts
    Settings:
      index, run
    Examples:
      ratecluster index --root my-run
      ratecluster index --root my-run --space z
    """
    sections, paths = begin(root, config_file, sets, address)
    with owning(paths.root, sections["run"]):
        made = index.run(sections["index"], paths, space)
    console.answer("", {"root": paths.root, "space": space.value, **made})


def search_command(
    root: Root,
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="a picture's file, or its URL")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="WORDS", help="as they are")] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="how many samples")] = 20,
    cluster: Annotated[
        int | None, typer.Option(metavar="ID", help="look in this cluster alone")
    ] = None,
    space: SpaceOption = Space.CLIP,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=f"for the strip of pictures [{STRIP}; --json: none]"),
    ] = None,
) -> None:
    """The samples most like a picture or a text: a table, and a strip of pictures.

    Scores are cosines. Texts are found in the space clip alone. --cluster reads all parts of the
    assignments once.

    Reads:
      {root}/index/{space}/              made by ratecluster index
      {root}/embeddings/, captions/      of what was found
      the input shards, for its pictures
    Writes:
      --html, a page without scripts, over what was there
    Examples:
      ratecluster search --root my-run --text 'a red flag'
      ratecluster search --root my-run --image query.jpg --space z --top 50
      ratecluster search --root my-run --text dog --cluster 3 --json
    """
    if (image is None) == (text is None):
        raise UserError("give either --image or --text")
    if text is not None and space is Space.Z:
        raise UserError(
            "--space z is of pictures alone: the network was trained on embeddings of images, and "
            "CLIP puts texts elsewhere; look for texts in --space clip"
        )
    _, paths = begin(root, None, None, None)
    run = search.Search(paths, [space])
    if text is not None:
        query = run.of_text(text)
    else:
        query = run.of_image(_picture(str(image)), space, run.max_pixels)
    hits, strip = run.nearest(query, space, top, cluster), None
    if html or not console.wants_json():
        strip = storage.absolute(html or STRIP)
        shown = pages.pictured(hits, run.max_pixels)
        title = f"Most like “{text}”" if text is not None else "Most like the picture"
        storage.write_bytes(strip, pages.page(title, note=paths.root, hits=shown).encode())
    facts = {"root": paths.root, "hits": pages.facts(hits), "pictures": strip}
    console.answer(f"{pages.text(hits)}\npictures: {strip}", facts)


def serve_command(
    root: Root,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="to listen on; others than loopback have no password"),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free")] = 8000,
) -> None:
    """A web page for searching a run by text or picture and for browsing its clusters.

    Pictures are read from the input shards as they are looked at. Ctrl-C ends it.

    Reads:
      what search reads
    Writes:
      nothing
    Examples:
      ratecluster serve --root my-run
      ratecluster serve --root s3://b/run --port 8080
    """
    _, paths = begin(root, None, None, None)

    def say(url: str) -> None:
        console.answer(f"{url}  (Ctrl-C ends it)", {"root": paths.root, "url": url})
        sys.stdout.flush()

    serve.run(paths, host, port, say)


def _picture(url: str) -> bytes:
    try:
        return storage.read_bytes(storage.absolute(url))
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error.strerror or error}; check --image") from None


def add(app: App) -> None:
    """Put them beside the stages' commands."""
    app.command("index")(index_command)
    app.command("search")(search_command)
    app.command("serve")(serve_command)
