"""The command that writes a run in the format of another tool."""

from enum import Enum
from importlib import import_module
from typing import Annotated

import typer

from pipeline.cli.help_pages import App
from pipeline.cli.options import Root, begin
from pipeline.runtime import console
from pipeline.runtime.errors import UserError


class Tool(str, Enum):
    """The tool that reads the export."""

    CLIP_RETRIEVAL = "clip-retrieval"
    COCO = "coco"
    FIFTYONE = "fiftyone"


def export_command(
    tool: Annotated[Tool, typer.Argument(help="tool that will read the export")],
    root: Root,
    out: Annotated[
        str,
        typer.Option(
            metavar="URL",
            help="folder that is new, empty, or holds this export; for coco a json file",
        ),
    ],
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="fiftyone: json column with the true class"),
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
    _, paths = begin(root, None, None, None)
    module = import_module(f"pipeline.explore.export.{tool.name.lower()}")
    module.run(paths, out, *([label] if tool is Tool.FIFTYONE else []))
    console.print_result("", {"root": paths.root, "tool": tool.value, "out": out})


def add(app: App) -> None:
    """Add the command."""
    app.command("export")(export_command)
