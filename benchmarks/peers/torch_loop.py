"""A peer: webdataset, torch's DataLoader and open_clip, as a plain script would have it.

Runs in a Python of its own, without this project.
"""

import sys

import numpy as np
import open_clip
import torch
import webdataset
from torch.utils.data import DataLoader


def main(name, weights, config, suffix, batch_size, threads, out, *shards):
    """Write keys and embeddings of the images of `shards` to `out`."""
    torch.set_num_threads(int(threads))
    if config:
        open_clip.add_model_config(config)
    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    model.eval()
    samples = (
        webdataset.WebDataset(list(shards), shardshuffle=False)
        .decode("pilrgb")
        .to_tuple("__key__", suffix)
        .map_tuple(None, preprocess)
    )
    keys, rows = [], []
    with torch.inference_mode():
        for names, pixels in DataLoader(samples, int(batch_size), num_workers=int(threads)):
            keys += names
            rows.append(model.encode_image(pixels, normalize=True).numpy().astype(np.float16))
    np.savez(out, keys=keys, rows=np.concatenate(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
