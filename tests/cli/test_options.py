"""The input of a run: shards, given embeddings, or both."""

import shutil

import pytest

from pipeline.cli import options
from pipeline.runtime import config
from pipeline.runtime.errors import UserError
from pipeline.store.listing import Paired
from tests.conftest import BUNDLED
from tests.given_vectors import write_parquet


@pytest.fixture
def vectors(tmp_path):
    return str(write_parquet(tmp_path / "v", n=3))


def sections(*settings: str) -> config.Sections:
    return config.load(options.KINDS, None, settings)


def test_embeddings_bring_their_own_settings(vectors, caplog):
    made, files = options.listed(sections("embeddings.id_column=key"), None, vectors)
    assert made["embed"] == made["embeddings"] and made["embed"].id_column == "key"
    assert [file.stem for file in files] == ["00000", "00001"] and not caplog.text
    options.listed(sections("embed.model=ViT-B-32"), None, vectors)
    assert "with --embeddings those of [embeddings] count" in caplog.text


def test_shards_alone_and_shards_with_embeddings(vectors, tmp_path):
    given = sections()
    for stem in ("00000", "00001"):
        shutil.copy(BUNDLED / f"{stem}.tar", tmp_path)
    made, shards = options.listed(given, str(tmp_path), None)
    assert made is given and len(shards) == 2
    _, pairs = options.listed(given, str(tmp_path), vectors)
    assert all(isinstance(pair, Paired) for pair in pairs)
    assert [(p.url[-9:], p.file_url[-13:]) for p in pairs] == [
        ("00000.tar", "00000.parquet"), ("00001.tar", "00001.parquet"),
    ]  # fmt: skip


def test_input_that_is_refused(vectors):
    with pytest.raises(UserError, match="no input: give --shards, --embeddings or both"):
        options.listed(sections(), None, None)
    namer = ("caption.namer=http://localhost:1/v1", "caption.namer_model=x")
    with pytest.raises(UserError, match=r"caption.namer needs pictures: give --shards"):
        options.listed(sections(*namer), None, vectors)
