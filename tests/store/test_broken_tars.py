"""Every sample of a broken tar is read, or the damage is named; verify agrees by its own rule."""

import io

import pytest

from pipeline.ops.verify import tar_walk
from tests.store import broken_tars
from tests.store.tars import read

TARS = broken_tars.tars()


def test_there_are_many():
    assert len(TARS) >= 60


@pytest.mark.parametrize("name", TARS)
def test_whole_samples_are_read_and_damage_is_named(name):
    broken = TARS[name]
    samples, end = read(broken.data)
    whole = [s.key for s in samples if not s.problem and len(s.members) == 3]
    assert whole == list(broken.keys)
    assert end.startswith(broken.end)
    found = tar_walk.walk(io.BytesIO(broken.data))
    assert not list(tar_walk.losses(found, {s.key for s in samples}, end))
