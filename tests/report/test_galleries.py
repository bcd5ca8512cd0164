"""Which members are shown, and where their pictures go."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.report import galleries, run_data
from pipeline.report import settings as report_settings
from pipeline.vision import thumbnails
from tests import fake_run


@pytest.fixture
def paths(tmp_path):
    return fake_run.build(tmp_path)


def shown(paths, **settings):
    run = run_data.collect(paths)
    rows = run_data.clusters(run, paths)
    return rows, galleries.add(rows, run, report_settings.Config(**settings), paths)


def test_pictures_are_in_the_page_while_it_is_small(paths):
    rows, (missing, strips) = shown(paths)
    assert missing == 0 and strips == []
    members = [member for row in rows for member in row["members"]]
    assert len(members) == 30
    assert all(m["picture"].startswith("data:image/webp") and m["tile"] is None for m in members)


def test_beyond_they_are_tiles_of_strips_beside_it(paths, monkeypatch):
    settings = {"gallery": 4, "thumbnail": 48}
    monkeypatch.setattr(report_settings, "EDGES", 1)
    rows, _ = shown(paths, **settings)
    first = sum(len(member["picture"]) for member in rows[0]["members"])
    room = galleries.FIXED_BYTES + 3 * galleries.CLUSTER_BYTES + first
    monkeypatch.setattr(galleries, "PAGE_BYTES", room)  # for the first cluster alone
    rows, (_, strips) = shown(paths, **settings)
    assert [row["members"][0]["tile"] for row in rows] == [None, 0, 0]
    assert strips == ["1.webp", "0.webp"] and paths.folder("report/galleries").names() == set(
        strips
    )
    last = rows[-1]  # of red things
    assert [m["tile"] for m in last["members"]] == list(range(6))
    assert {m["picture"] for m in last["members"]} == {"galleries/0.webp"}
    strip = Image.open(Path(paths.folder("report/galleries").url) / "0.webp")
    assert strip.size == (48, 48 * 6)
    for tile in range(6):
        red, green, blue = strip.convert("RGB").getpixel((24, 48 * tile + 24))
        assert red > 150 > max(green, blue)


def test_strips_of_before_are_gone(paths, monkeypatch):
    monkeypatch.setattr(galleries, "CLUSTER_BYTES", 20_000_000)
    assert len(shown(paths)[1][1]) == 3
    monkeypatch.undo()
    shown(paths)
    assert not paths.folder("report/galleries").names()


def test_a_strip_has_each_picture_in_the_middle_of_its_tile():
    def webp(colour, size):
        out = io.BytesIO()
        Image.new("RGB", size, colour).save(out, "WEBP", lossless=True)
        return out.getvalue()

    found = [webp((250, 0, 0), (32, 16)), None, webp((0, 0, 250), (16, 32))]
    strip = np.asarray(Image.open(io.BytesIO(thumbnails.strip(found, 4, 32))).convert("RGBA"))
    assert strip.shape == (128, 32, 4)
    opaque = strip[..., 3] > 128
    assert [int(opaque[32 * i : 32 * i + 32].sum()) for i in range(4)] == [512, 0, 512, 0]
    assert opaque[8:24].all() and not opaque[:8].any()
    assert opaque[64:96, 8:24].all() and not opaque[64:96, :8].any()


@pytest.mark.parametrize(
    ("text", "size", "expected"),
    [("abc", 3, "abc"), ("abcdefgh", 6, "abc…"), ("äöü ß", 7, "äö…"), ("a\ud800", 9, "a?")],
)
def test_texts_are_cut_by_their_bytes(text, size, expected):
    assert galleries.cut(text, size) == expected
    assert len(galleries.cut(text, size).encode()) <= size
