"""README.md of a run: describes its tables to Hugging Face `datasets`.

`load_dataset(root)` reads the labels, `load_dataset(root, "embeddings")` and `"clusters"` the other
tables. Without the file, `datasets` would read all Parquet files of the run as one table. On a hub
it is the page of the run.
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
    """The whole file; no text in it comes from the data."""
    return CARD.format(samples=samples, clusters=clusters)
