"""The commands that search a finished run, or write it in the format of another tool."""

import sys
from enum import Enum
from importlib import import_module
from typing import Annotated

from typer import Argument, Option

from pipeline.artifacts.layout import Space
from pipeline.cli.options import Common, Root
from pipeline.runtime import console
from pipeline.runtime.errors import UserError
from pipeline.store import storage

STRIP = "ratecluster-search.html"
SpaceOption = Annotated[
    Space, Option(help="what is compared; clip: CLIP embeddings; z: features of the network")
]


class Tool(str, Enum):
    """The tool that reads the export."""

    CLIP_RETRIEVAL = "clip-retrieval"
    COCO = "coco"
    FIFTYONE = "fiftyone"


def index_command(root: Root, space: SpaceOption = Space.CLIP, *, common: Common) -> None:
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

    with common.locked(root) as (sections, paths):
        made = index.run(sections["index"], paths, space)
    console.print_result("", {"root": paths.root, "space": space.value, **made})


def search_command(
    root: Root,
    image: Annotated[str | None, Option(metavar="FILE", help="path or URL of an image")] = None,
    text: Annotated[str | None, Option(metavar="WORDS", help="text to search for")] = None,
    sample: Annotated[str | None, Option(metavar="ID", help="sample_id of a sample")] = None,
    top: Annotated[int, Option(min=1, max=1000, help="number of results")] = 20,
    cluster: Annotated[int | None, Option(metavar="ID", help="search only this cluster")] = None,
    space: SpaceOption = Space.CLIP,
    html: Annotated[
        str | None,
        Option(metavar="FILE", help=f"page with the images [{STRIP}; with --json no page]"),
    ] = None,
) -> None:
    """Find the samples most similar to an image, a text or a sample of the run.

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
      ratecluster search --root my-run --sample 00000/000000012
    """
    if sum(query is not None for query in (image, text, sample)) != 1:
        raise UserError("give either --image, --text or --sample")
    if text is not None and space is Space.Z:
        raise UserError(
            "--space z needs --image: the network was trained on embeddings of images, and CLIP "
            "embeds texts elsewhere; search for texts with --space clip"
        )
    from pipeline.explore.search import pages, search

    _, paths = Common().begin(root)
    run = search.Search(paths, [space])
    if text is not None:
        query = run.of_text(text)
    elif sample is not None:
        query = run.of_sample(sample, space)
    else:
        query = run.of_image(_read_image(str(image)), space, run.max_pixels)
    hits, strip = run.nearest(query, space, top, cluster), None
    if html or not console.wants_json():
        strip = storage.absolute(html or STRIP)
        shown = pages.with_thumbnails(hits, run.max_pixels)
        what = f"“{text}”" if text is not None else sample or "the image"
        title = f"Most similar to {what}"
        storage.write_bytes(strip, pages.page(title, note=paths.root, hits=shown).encode())
    facts = {"root": paths.root, "hits": pages.facts(hits), "pictures": strip}
    console.print_result(f"{pages.text(hits)}\npictures: {strip}", facts)


def serve_command(
    root: Root,
    host: Annotated[
        str,
        Option(
            metavar="ADDRESS",
            help="address to listen on; other machines can reach any but 127.0.0.1, without "
            "a password",
        ),
    ] = "127.0.0.1",
    port: Annotated[int, Option(min=0, max=65535, help="0: any free port")] = 8000,
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

    _, paths = Common().begin(root)

    def print_url(url: str) -> None:
        console.print_result(f"{url}  (Ctrl-C stops it)", {"root": paths.root, "url": url})
        sys.stdout.flush()

    serve.run(paths, host, port, print_url)


def _read_image(url: str) -> bytes:
    try:
        return storage.read_bytes(storage.absolute(url))
    except OSError as error:
        raise UserError(f"{url} cannot be read: {error.strerror or error}; check --image") from None


def export_command(
    tool: Annotated[Tool, Argument(help="tool that will read the export")],
    root: Root,
    out: Annotated[
        str,
        Option(
            metavar="URL",
            help="folder that is new, empty, or holds this export; for coco a json file",
        ),
    ],
    label: Annotated[
        str | None,
        Option(metavar="COLUMN", help="fiftyone: json column with the true class"),
    ] = None,
) -> None:
    """Write a finished run in the format of another tool.

    Rejected and excluded samples are not exported. An interrupted export
    resumes; coco, which is one file, starts again. Other files in --out are
    never overwritten.

    clip-retrieval gets the output of `clip-retrieval inference`, for its index
    and back end. Give its back end the run's embed.model as --clip_model.

    coco has a category per cluster (cluster_id + 1). Each sample is an image
    with one annotation: its box is the whole image, its score the confidence.
    file_name is the name that the fiftyone export gives the image.

    fiftyone gets images and labels for FiftyOneDataset, in a local folder. It
    loads the labels into memory when it imports them.

    Reads:
      {root}/labels/, embeddings/, clusters.parquet
      the input shards, for fiftyone
    Writes:
      clip-retrieval  {out}/img_emb/img_emb_{i}.npy   float16, a file per shard
                      {out}/metadata/metadata_{i}.parquet
                      image_path (the key), sample_id, caption, cluster_id, ...
      coco            {out}   images, annotations, categories
      fiftyone        {out}/samples.json, data/   cluster, ground_truth (--label)

    Examples:
      ratecluster export clip-retrieval --root my-run --out for-clip-retrieval
      ratecluster export coco --root my-run --out my-run.json
      ratecluster export fiftyone --root my-run --out for-fiftyone --label label
    """
    if label and tool is not Tool.FIFTYONE:
        raise UserError(f"--label {label}: only fiftyone uses it; leave it out")
    _, paths = Common().begin(root)
    module = import_module(f"pipeline.explore.export.{tool.name.lower()}")
    module.run(paths, out, *([label] if tool is Tool.FIFTYONE else []))
    console.print_result("", {"root": paths.root, "tool": tool.value, "out": out})
