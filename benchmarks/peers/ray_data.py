"""A peer: Ray Data as its guide "Working with Images" has it: read, map, map_batches, write.

Runs in a Python of its own, without this project.
"""

import sys

import open_clip
import ray
import torch
from PIL import Image


class Embed:
    """The model, loaded once in an actor."""

    def __init__(self, name, weights, config, threads):
        torch.set_num_threads(threads)
        if config:
            open_clip.add_model_config(config)
        self.model = open_clip.create_model(name, pretrained=weights).eval()

    def __call__(self, batch):
        with torch.inference_mode():
            rows = self.model.encode_image(torch.from_numpy(batch["image"]), normalize=True)
        return {"key": batch["key"], "embedding": rows.half().numpy()}


def main(name, weights, config, suffix, batch_size, threads, out, *shards):
    """Write keys and embeddings of the images of `shards` to Parquet files in `out`."""
    if config:
        open_clip.add_model_config(config)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    preprocess = open_clip.image_transform(size, is_train=False)

    def transform_image(row):
        return {"key": row["__key__"], "image": preprocess(Image.fromarray(row[suffix])).numpy()}

    ray.init(address="local", num_cpus=int(threads))
    (
        ray.data.read_webdataset(list(shards))
        .map(transform_image)
        .map_batches(
            Embed,
            fn_constructor_args=(name, weights, config, int(threads)),
            compute=ray.data.ActorPoolStrategy(size=1),
            batch_size=int(batch_size),
        )
        .write_parquet(out)
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
