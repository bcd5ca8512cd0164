"""The commands that search a finished run."""

import sys
from typing import Annotated

import typer

from pipeline.artifacts.layout import Space
from pipeline.cli.help_pages import App
from pipeline.cli.options import Address, ConfigFile, Overrides, Root, begin, lock_root
from pipeline.runtime import console
from pipeline.runtime.errors import UserError
from pipeline.store import storage

STRIP = "ratecluster-search.html"
SpaceOption = Annotated[
    Space,
    typer.Option(help="what is compared; clip: CLIP embeddings; z: features of the network"),
]


def index_command(
    root: Root,
    space: SpaceOption = Space.CLIP,
    config_file: ConfigFile = None,
    sets: Overrides = None,
    address: Address = None,
) -> None:
    """Build a FAISS index of a run, for search and serve.

    Up to index.flat_below samples are stored in full and compared one by one.
    With more samples, the index is compressed (IVF-PQ) and trained on a sample
    of them; search then compares the best candidates in full precision. A rerun
    builds only the missing parts.

    Reads:
      {root}/embeddings/                 all parts
      {root}/network/                    for --space z
    Writes:
      {root}/index/{space}/              the trained index, files of several parts

    Examples:
      ratecluster index --root my-run
      ratecluster index --root my-run --space z
    Settings: index, run
    """
    from pipeline.explore.search import index

    sections, paths = begin(root, config_file, sets, address)
    with lock_root(paths.root, sections["run"]):
        made = index.run(sections["index"], paths, space)
    console.print_result("", {"root": paths.root, "space": space.value, **made})


def search_command(
    root: Root,
    image: Annotated[
        str | None, typer.Option(metavar="FILE", help="path or URL of an image")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="WORDS", help="text to search for")] = None,
    top: Annotated[int, typer.Option(min=1, max=1000, help="number of results")] = 20,
    cluster: Annotated[
        int | None, typer.Option(metavar="ID", help="search only this cluster")
    ] = None,
    space: SpaceOption = Space.CLIP,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help=f"page with the images [{STRIP}; with --json no page]"),
    ] = None,
) -> None:
    """Find the samples most similar to an image or a text.

    Prints a table with cosines, and writes a page with the images. Texts can
    only be searched in --space clip. --cluster reads all parts of the
    assignments once.

    Reads:
      {root}/index/{space}/              written by ratecluster index
      {root}/embeddings/, captions/      of the results
      the input shards, for the images of the results
    Writes:
      --html, a page without scripts; replaces an older one

    Examples:
      ratecluster search --root my-run --text 'a red flag'
      ratecluster search --root my-run --image query.jpg --space z --top 50
      ratecluster search --root my-run --text dog --cluster 3 --json
    """
    if (image is None) == (text is None):
        raise UserError("give either --image or --text")
    if text is not None and space is Space.Z:
        raise UserError(
            "--space z needs --image: the network was trained on embeddings of images, and CLIP "
            "embeds texts elsewhere; search for texts with --space clip"
        )
    from pipeline.explore.search import pages, search

    _, paths = begin(root, None, None, None)
    run = search.Search(paths, [space])
    if text is not None:
        query = run.of_text(text)
    else:
        query = run.of_image(_read_image(str(image)), space, run.max_pixels)
    hits, strip = run.nearest(query, space, top, cluster), None
    if html or not console.wants_json():
        strip = storage.absolute(html or STRIP)
        shown = pages.with_thumbnails(hits, run.max_pixels)
        title = f"Most similar to “{text}”" if text is not None else "Most similar to the image"
        storage.write_bytes(strip, pages.page(title, note=paths.root, hits=shown).encode())
    facts = {"root": paths.root, "hits": pages.facts(hits), "pictures": strip}
    console.print_result(f"{pages.text(hits)}\npictures: {strip}", facts)


def serve_command(
    root: Root,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS",
            help="address to listen on; other machines can reach any but 127.0.0.1, without "
            "a password",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free port")] = 8000,
) -> None:
    """Serve a web page to search a run and browse its clusters.

    Search by text or image. Images are read from the input shards when they are
    shown. Press Ctrl-C to stop.

    Reads:
      the same files as search
    Writes:
      nothing

    Examples:
      ratecluster serve --root my-run
      ratecluster serve --root s3://b/run --port 8080
    """
    from pipeline.explore.search import serve

    _, paths = begin(root, None, None, None)

    def print_url(url: str) -> None:
        console.print_result(f"{url}  (Ctrl-C stops it)", {"root": paths.root, "url": url})
        sys.stdout.flush()

    serve.run(paths, host, port, print_url)


def _read_image(url: str) -> bytes:
    try:
        return storage.read_bytes(storage.absolute(url))
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error.strerror or error}; check --image") from None


def add(app: App) -> None:
    """Add the commands."""
    app.command("index")(index_command)
    app.command("search")(search_command)
    app.command("serve")(serve_command)
