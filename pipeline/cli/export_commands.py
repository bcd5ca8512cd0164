"""The command that hands a run on to other tools. What it says is its manual page."""

from enum import Enum
from typing import Annotated

import typer

from pipeline.cli.help_pages import App
from pipeline.cli.options import Root, begin
from pipeline.explore.export import clip_retrieval as export_clip_retrieval
from pipeline.explore.export import coco as export_coco
from pipeline.explore.export import fiftyone as export_fiftyone
from pipeline.runtime import console
from pipeline.runtime.errors import UserError


class Tool(str, Enum):
    """Who reads what is exported."""

    CLIP_RETRIEVAL = "clip-retrieval"
    COCO = "coco"
    FIFTYONE = "fiftyone"


def export_command(
    tool: Annotated[Tool, typer.Argument(help="who shall read it")],
    root: Root,
    out: Annotated[
        str,
        typer.Option(metavar="URL", help="folder, new, empty or of this export; coco: a json file"),
    ],
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="fiftyone: json column of the true class"),
    ] = None,
) -> None:
    """A finished run in the form that another tool reads.

    Rejected and excluded samples are left out. What was interrupted goes on where it was (coco, one
    file, begins anew); what lies there and is anything else is not touched.

    clip-retrieval: what `clip-retrieval inference` writes, for its index and back end, whose
    --clip_model has to be the run's embed.model. coco: a category for each cluster
    (cluster_id + 1), and for every sample an image with one annotation, whose box is the whole
    image and whose score is the confidence; file_name is what fiftyone calls the picture below its
    data folder. fiftyone: pictures and labels for FiftyOneDataset, in a local folder; it holds the
    labels in memory when it imports.

    Reads:
      {root}/labels/, embeddings/, clusters.parquet; fiftyone: the input shards, too
    Writes:
      clip-retrieval  {out}/img_emb/img_emb_{i}.npy   float16, a file per shard
                      {out}/metadata/metadata_{i}.parquet
                      image_path (the key), sample_id, caption, cluster_id, url, ...
      coco            {out}   images, annotations, categories
      fiftyone        {out}/samples.json, data/   cluster, ground_truth (--label)
    Examples:
      ratecluster export clip-retrieval --root my-run --out for-clip-retrieval
      ratecluster export coco --root my-run --out my-run.json
      ratecluster export fiftyone --root my-run --out for-fiftyone --label label
    """
    if label and tool is not Tool.FIFTYONE:
        raise UserError(f"--label {label}: of fiftyone alone; leave it out")
    _, paths = begin(root, None, None, None)
    if tool is Tool.FIFTYONE:
        export_fiftyone.run(paths, out, label)
    else:
        room = export_coco if tool is Tool.COCO else export_clip_retrieval
        room.run(paths, out)
    console.answer("", {"root": paths.root, "tool": tool.value, "out": out})


def add(app: App) -> None:
    """Put it beside the stages' commands."""
    app.command("export")(export_command)
