"""README.md of a run: its tables as configurations of Hugging Face `datasets`.

`load_dataset(root)` is then the labels, `load_dataset(root, "embeddings")` and `"clusters"` the
others; without it `datasets` would read all Parquet files below the root as one table. Where a run
is uploaded to a hub, it is its page.
"""

CARD = """---
configs:
- config_name: labels
  default: true
  data_files: labels/*.parquet
- config_name: embeddings
  data_files: embeddings/*.parquet
- config_name: clusters
  data_files: clusters.parquet
---
# A collection labelled by ratecluster

{samples:,} samples in {clusters:,} clusters. `labels` has a row for every sample, `embeddings` for
every one that could be read, `clusters` for every cluster; they join by `sample_id` and
`cluster_id`. `report/index.html` shows the clusters, `run.json` says what made them.
"""


def text(samples: int, clusters: int) -> str:
    """The whole file; nothing of it comes from the data."""
    return CARD.format(samples=samples, clusters=clusters)
