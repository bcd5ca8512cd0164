"""The commands that hand a run on to other tools."""

from typing import Annotated

import typer

from pipeline.options import Root, begin
from pipeline.use import export_clip_retrieval, export_coco, export_fiftyone

exports = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="A finished run in the form that another tool reads.\n\n"
    "Rejected samples are left out. What was interrupted goes on where it was; what is there "
    "already is not made again, and what lies there and is anything else is not touched.",
)
OutFolder = Annotated[str, typer.Option(help="URL of the folder: new, empty, or of this export")]


def add(app: typer.Typer) -> None:
    """Put them below `export`."""
    app.add_typer(exports, name="export")


@exports.command(export_clip_retrieval.NAME)
def clip_retrieval_command(root: Root, out: OutFolder) -> None:
    """Embeddings and metadata as `clip-retrieval inference` writes them.

    \b
    img_emb/img_emb_{i}.npy          (n, d) float16, one file per shard
    metadata/metadata_{i}.parquet    image_path (the key), sample_id, caption, cluster_id,
                                     cluster_caption, confidence, and the columns of the json:
                                     url, NSFW, similarity, ...

    \b
    Then   clip-retrieval index --embeddings_folder OUT --index_folder INDEX
           clip-retrieval back --indices_paths indices.json --clip_model ...
               --columns_to_return '["url","image_path","caption","sample_id","cluster_caption"]'

    The back end's --clip_model has to be the run's embed.model.
    """
    _, paths = begin(root, None, None, None)
    export_clip_retrieval.run(paths, out)


@exports.command(export_coco.NAME)
def coco_command(
    root: Root,
    out: Annotated[str, typer.Option(help="URL of the json file")],
) -> None:
    """One json file as of COCO's instances: a category for each cluster.

    Every sample is an image with one annotation, whose bbox and segmentation are the whole image,
    and whose score is the confidence. Category ids are cluster_id + 1. coco_url is the column url,
    if there is one. file_name is what `ratecluster export fiftyone` calls the picture below its
    data folder, so that OUT/data is the folder of images for this file, too.
    """
    _, paths = begin(root, None, None, None)
    export_coco.run(paths, out)


@exports.command(export_fiftyone.NAME)
def fiftyone_command(
    root: Root,
    out: OutFolder,
    label: Annotated[
        str | None, typer.Option(help="json column of the true class, to be ground_truth")
    ] = None,
) -> None:
    """Pictures and labels as a FiftyOneDataset, in a local folder.

    \b
    cluster         Classification: its name, and the confidence
    ground_truth    Classification, with --label
    sample_id, shard, key, caption, cluster_id, margin, outlier_score
    original        the columns of the json

    \b
    Then, in Python:
        import fiftyone as fo
        dataset = fo.Dataset.from_dir(dataset_dir=OUT, dataset_type=fo.types.FiftyOneDataset)
        fo.launch_app(dataset)

    All pictures are copied out of the shards, which have to lie where they were embedded from.
    FiftyOne holds the labels in memory when it imports: take a part of a large collection.
    """
    _, paths = begin(root, None, None, None)
    export_fiftyone.run(paths, out, label)
