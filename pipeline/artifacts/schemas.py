"""The schemas of all tables of a run."""

from collections.abc import Iterable

import pyarrow as pa

from pipeline.artifacts import views
from pipeline.store import columns, tables

IDENTITY = [
    ("sample_id", pa.string()),  # "{shard}/{key}", unique in a run
    ("shard", pa.string()),  # stem of the shard, or of the file of given embeddings
    ("key", pa.string()),  # webdataset's key; of given embeddings the id
    ("index", pa.int32()),  # position in the shard or file
]
SOURCE = [
    ("image_member", pa.string()),  # name of the image in the tar; null without shards
    ("tar_offset", pa.int64()),  # where its bytes begin in the tar
    ("tar_size", pa.int64()),  # bytes
    ("image_width", pa.int32()),  # pixels, upright
    ("image_height", pa.int32()),  # pixels, upright
]
TEXTS = [
    ("caption", pa.string()),  # the sample's own: its .txt, else the `caption` of its json
    ("json", pa.string()),  # the sample's own text, unchanged
    ("text_problem", pa.string()),  # what cannot be read of its txt and json; null if nothing
    ("cls", pa.string()),  # the class in its .cls, as webdataset's examples have it
]
LATER = {"text_problem", "cls"}  # columns that parts of earlier versions lack
REJECTS = pa.schema(
    [
        *IDENTITY,
        ("member", pa.string()),  # name of the damaged file in the tar
        ("reason", pa.string()),  # a code; details after a colon
        *TEXTS,
    ]
)
EXCLUDED = pa.schema(
    [
        ("sample_id", pa.string()),  # of an excluded sample
        ("reason", pa.string()),  # from the list
    ]
)
HISTORY = pa.schema(
    [
        ("step", pa.int32()),  # of training, from 0
        ("loss", pa.float64()),  # R_c − R, nats
        ("expansion", pa.float64()),  # R(Z), nats
        ("compression", pa.float64()),  # R_c(Z, Π), nats
        ("sinkhorn_residual", pa.float64()),  # largest |column sum − 1| of Π
        ("gradient_norm", pa.float64()),  # over all weights
        ("samples_per_s", pa.float64()),  # trained on
    ]
)
CURVE = pa.schema(
    [
        ("k", pa.int32()),  # number of clusters
        ("bits", pa.float64()),  # L(Z, cut) over all samples
        ("low", pa.float64()),  # 5th percentile of bits over resamples
        ("high", pa.float64()),  # 95th
        ("modularity", pa.float64()),  # of the cut's graph; null for a k that was not compared
        ("stability", pa.float64()),  # adjusted Rand index to cuts of random halves; or null
        ("silhouette", pa.float64()),  # −1 to 1; or null
    ]
)
TREE = pa.schema(
    [
        ("k", pa.int32()),  # clusters left after this merge
        ("kept", pa.int32()),  # cluster whose number the merged cluster has
        ("merged", pa.int32()),  # cluster whose number disappears
        ("bits_saved", pa.float64()),  # negative where merging costs bits
    ]
)
KINDS = ("typical", "borderline", "odd")  # most centrality, least margin, most outlier_score
EXEMPLARS = pa.schema(
    [
        ("cluster_id", pa.int32()),  # 0 is the largest cluster
        ("kind", pa.string()),  # of KINDS; a member may be of several
        ("rank", pa.int32()),  # within its kind, from 0
        ("centrality", pa.float32()),  # cosine to the mean direction of the cluster's prototypes
        ("outlier_score", pa.float32()),
        ("margin", pa.float32()),
        *IDENTITY[:3],
        *SOURCE[:3],
        ("caption", pa.string()),
    ]
)
TOP = 3  # clusters that a label names, most likely first
ASSIGNMENTS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("cluster_id", pa.int32()),
        ("confidence", pa.float32()),  # share of its cluster, 0 to 1
        ("margin", pa.float32()),  # confidence minus the best other share
        ("outlier_score", pa.float32()),  # 1 − cosine to the nearest prototype, 0 to 2
        ("top_clusters", pa.list_(pa.int32())),  # the likeliest clusters, most likely first
        ("top_shares", pa.list_(pa.float32())),  # their shares, 0 to 1
        ("group", pa.int32()),  # the small group of its cluster, a row of levels.parquet
    ]
)
CAPTIONS = pa.schema(
    [
        ("cluster_id", pa.int32()),
        ("rank", pa.int32()),  # 0 is the best caption
        ("caption", pa.string()),  # a word or phrase for the cluster; two words: "jeans / shorts"
        ("share", pa.float32()),  # of members that it fits, less that elsewhere; 0: a model's name
        ("source", pa.string()),  # vocabulary | alt text | model | number
    ]
)
LEVEL_CAPTIONS = pa.schema(  # of the clusters of all levels but that of cluster_id
    [
        ("level", pa.int8()),  # from 1, the coarsest
        ("cluster_id", pa.int32()),  # cluster_l1, cluster_l2, … of the samples
        *[(name, CAPTIONS.field(name).type) for name in ("caption", "share", "source")],
    ]
)
LEVELS = pa.schema(
    [
        ("level", pa.int8()),  # from 1, the coarsest
        ("cluster_id", pa.int32()),  # cluster_l1, cluster_l2, … of the samples; 0 is the largest
        ("parent", pa.int32()),  # the cluster of the level before that contains it
        ("size", pa.int64()),  # samples
        ("cluster_caption", pa.string()),
        ("share", pa.float32()),  # how sure the caption is, 0 to 1
    ]
)
CLUSTERS = pa.schema(
    [
        ("cluster_id", pa.int32()),
        ("size", pa.int64()),  # samples
        ("cluster_caption", pa.string()),  # its best caption
        ("captions", pa.list_(pa.string())),  # best first
        ("caption_shares", pa.list_(pa.float32())),  # how sure each caption is, 0 to 1
        ("bits_per_sample", pa.float64()),  # coding length of its features over its size
        ("nearest_clusters", pa.list_(pa.int32())),  # nearest first
        ("typical_samples", pa.list_(pa.string())),  # sample_ids, most typical first
    ]
)
LABEL = [  # the columns of a label after IDENTITY and before those of the json
    ("status", pa.string()),  # success | rejected | excluded
    ("error_message", pa.string()),  # why it was rejected or excluded
    ("caption", pa.string()),
    TEXTS[2],
    *SOURCE,
    ("cluster_id", pa.int32()),
    ("cluster_caption", pa.string()),
    *[(f.name, f.type) for f in ASSIGNMENTS if f.name not in ("sample_id", "cluster_id", "group")],
]
LEVEL = [  # the columns of a label for its levels, from coarse to fine; one of them is cluster_id
    ("cluster_l1", pa.int32()),  # the cluster of the coarsest level; 0 is the largest
    ("cluster_l1_caption", pa.string()),  # its caption
    ("cluster_l2", pa.int32()),  # the cluster of the second level
    ("cluster_l2_caption", pa.string()),  # its caption
    ("cluster_l3", pa.int32()),  # the cluster of the third level, if there is one
    ("cluster_l3_caption", pa.string()),  # its caption
    ("cluster_l4", pa.int32()),  # the cluster of the fourth
    ("cluster_l4_caption", pa.string()),  # its caption
    ("cluster_l5", pa.int32()),  # the cluster of the fifth
    ("cluster_l5_caption", pa.string()),  # its caption
]
MOST_LEVELS = len(LEVEL) // 2
# The columns of a label that go under "ratecluster" into the json of a labelled shard.
IN_JSON = ("status", "error_message", "cluster_id", "cluster_caption", "confidence", "margin")


def embeddings_schema(*dims: int) -> pa.Schema:
    """Rows of `embeddings/{stem}.parquet`: one per readable sample. `dims` of each encoder."""
    first = ("embedding", tables.vectors(dims[0]))  # of the image by embed.model, L2-normalised
    more = [
        (views.column(place), tables.vectors(dim)) for place, dim in enumerate(dims) if place > 0
    ]
    return pa.schema([*IDENTITY, *SOURCE, *TEXTS, first, *more])


def sample_schema(input_dim: int, feature_dim: int) -> pa.Schema:
    """Rows of `network/sample.parquet`: landmarks before and after the network."""
    return pa.schema(
        [
            ("sample_id", pa.string()),
            ("embedding", tables.vectors(input_dim)),
            ("feature", tables.vectors(feature_dim, pa.float32())),  # z, the output of the network
        ]
    )


def prototypes_schema(feature_dim: int) -> pa.Schema:
    """Rows of `clusters/prototypes.parquet`: one or more per cluster, in the order of clusters."""
    return pa.schema(
        [
            ("cluster_id", pa.int32()),
            ("vector", tables.vectors(feature_dim, pa.float32())),  # a prototype, unit norm
        ]
    )


def levels_schema(feature_dim: int) -> pa.Schema:
    """Rows of `clusters/levels.parquet`: one per small group, in the order of clusters."""
    return pa.schema(
        [
            ("cluster_id", pa.int32()),
            ("levels", pa.list_(pa.int32())),  # its cluster at each level, from coarse to fine
            ("vector", tables.vectors(feature_dim, pa.float32())),  # mean direction, unit norm
        ]
    )


def candidates_schema(dim: int) -> pa.Schema:
    """Rows of `captions/candidates.parquet`: the words and phrases that may be captions."""
    return pa.schema(
        [
            ("caption", pa.string()),  # a word or phrase
            ("source", pa.string()),  # vocabulary | alt text
            ("vector", tables.vectors(dim)),  # by the text encoder, unit length; zeros without one
            ("clusters", pa.list_(pa.int32())),  # clusters whose alt texts contain it
            ("text_scores", pa.list_(pa.float32())),  # how well it separates each of them, 0 to 1
        ]
    )


def label_names(kinds: Iterable[str]) -> dict[str, str]:
    """Original json column -> its name in labels: the same, or `input_…` if that is taken.

    Names are compared without case, as in SQL: LAION's SAMPLE_ID becomes input_SAMPLE_ID. Otherwise
    DuckDB would call it SAMPLE_ID_1, and Spark would read neither.
    """
    taken = {name.lower() for name, _ in [*IDENTITY, *LABEL, *LEVEL]}
    names: dict[str, str] = {}
    for column in sorted(kinds, key=lambda c: (c.lower() in taken, c != c.lower(), c)):
        name = column
        while name.lower() in taken:
            name = f"input_{name}"
        taken.add(name.lower())
        names[column] = name
    return names


def labels_schema(kinds: dict[str, str], levels: int) -> pa.Schema:
    """Rows of `labels/{stem}.parquet`; `kinds` are the kinds of the run's json columns.

    There are columns for the levels where there is more than one.
    """
    names = label_names(kinds)
    originals = [(names[column], columns.TYPES[kind]) for column, kind in sorted(kinds.items())]
    ours = LEVEL[: 2 * levels] if levels > 1 else []
    return pa.schema([*IDENTITY, *LABEL, *ours, *originals])
