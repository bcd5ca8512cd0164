"""Whether a run has shards, and so pictures."""

import pytest

from pipeline.artifacts import inputs
from pipeline.embed.given.settings import Config as GivenConfig
from pipeline.embed.settings import Config
from pipeline.runtime import config
from pipeline.runtime.errors import UserError

TAR, FILE = {"stem": "a", "url": "/a.tar"}, {"stem": "a", "url": "/a.parquet"}
BOTH = {**TAR, "file_url": "/a.parquet"}


@pytest.mark.parametrize(
    ("cfg", "shard", "given", "pictures"),
    [(Config(), TAR, False, True), (GivenConfig(), FILE, True, False),
     (GivenConfig(), BOTH, True, True)],
)  # fmt: skip
def test_what_a_run_was_made_from(cfg, shard, given, pictures):
    embedded = {"config": config.facts(cfg), "shards": [{"shard": shard}]}
    assert inputs.are_given(embedded["config"]) == given
    assert inputs.has_shards(embedded) == pictures
    if pictures:
        inputs.require_shards(embedded, "x")
    else:
        with pytest.raises(UserError, match=r"x needs pictures, .* with --shards"):
            inputs.require_shards(embedded, "x")
