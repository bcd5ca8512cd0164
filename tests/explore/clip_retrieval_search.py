"""Run by a Python with clip-retrieval: index an export, ask for each sample by its own vector.

python clip_retrieval_search.py EXPORT INDEX_FOLDER; the last line is {sample_id: metadata found}.
"""

import json
import sys

import faiss
import numpy as np
from clip_retrieval.clip_back import ParquetMetadataProvider, meta_to_dict
from clip_retrieval.clip_index import clip_index
from embedding_reader import EmbeddingReader

exported, index_folder = sys.argv[1:]
reader = EmbeddingReader(
    f"{exported}/img_emb", "parquet_npy", None, ["sample_id"], f"{exported}/metadata"
)
vectors, ids = [], []
for batch, meta in reader(batch_size=7, show_progress=False):
    vectors.append(batch.copy())
    ids += meta["sample_id"].tolist()
clip_index(exported, index_folder, nb_cores=1)
index = faiss.read_index(f"{index_folder}/image.index")
provider = ParquetMetadataProvider(f"{index_folder}/metadata")
columns = ["url", "image_path", "caption", "sample_id", "cluster_id", "cluster_caption"]
_, nearest = index.search(np.concatenate(vectors), 1)
metas = provider.get(nearest[:, 0].tolist(), columns)
print(json.dumps({i: meta_to_dict(m) for i, m in zip(ids, metas, strict=True)}))
