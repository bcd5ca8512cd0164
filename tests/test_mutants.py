"""Damaged copies of shards through embed and verify; `python -m tests.mutants` does 2,000."""

import pytest

from tests import mutants
from tests.store import broken_tars

pytestmark = pytest.mark.ray


def test_no_sample_of_a_damaged_shard_is_lost_in_silence(ray_session, tmp_path, capsys):
    assert mutants.run(tmp_path, 60, seed=1) == 0
    assert "lost in silence: 0" in capsys.readouterr().out


def test_verify_finds_what_an_embed_that_stops_at_zeros_loses(ray_session, tmp_path, capsys):
    """The reader of tarfile, which the stages had before, ends at the first block of zeros."""
    shards = tmp_path / "shards"
    shards.mkdir()
    found = broken_tars.tars()
    names = ("joined-ustar", "middle-of-1-blocks", "hole-of-samples-2-to-3")
    for name in names:
        (shards / f"{name}.tar").write_bytes(found[name].data)
    root = str(tmp_path / "run")
    arguments = ["embed", "--shards", str(shards), "--root", root]
    assert mutants.cli.invoke(arguments) == 0
    assert mutants.cli.invoke(["verify", "--root", root]) == 0
    paths = mutants.layout.RunPaths(root)
    for name in names:  # as if the stage had read to the first zeros only
        losing(paths, name, found[name].data)
    capsys.readouterr()
    assert mutants.cli.invoke(["verify", "--root", root]) == 1
    out = capsys.readouterr().out
    assert all(f"embeddings/ and rejects/{name}: has no row for 0" in out for name in names)


def losing(paths: mutants.layout.RunPaths, stem: str, data: bytes) -> None:
    """Remove the rows behind the first zeros of a shard, and all that names the zeros."""
    blocks = range(0, len(data), mutants.BLOCK)
    zeros = next(at for at in blocks if not any(data[at : at + mutants.BLOCK]))
    file = paths.embeddings.file(f"{stem}.parquet")
    facts, part = mutants.tables.facts(file), mutants.tables.read(file)
    kept = part.filter([offset < zeros for offset in part["tar_offset"].to_pylist()])
    changed = {"samples": len(kept), "embedded": len(kept), "end": "complete"}
    mutants.tables.write(file, kept, **facts | changed)
    rejects = paths.rejects.file(f"{stem}.parquet")
    empty = mutants.tables.read(rejects).slice(0, 0)
    mutants.tables.write(rejects, empty, stage=facts["stage"])
    manifest = paths.embeddings.manifest()
    for shard in manifest["shards"]:
        if shard["shard"]["stem"] == stem:
            shard |= changed
    for name in ("samples", "embedded"):
        manifest[name] = sum(shard[name] for shard in manifest["shards"])
    paths.embeddings.finish(manifest.pop("fingerprint"), **manifest)
