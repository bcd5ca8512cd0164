"""Search: the run's own model asks, the nearest answer, and nothing of the web's texts acts."""

import json
import re

import numpy as np
import pytest

from pipeline.artifacts.layout import Space
from pipeline.cli import main as cli
from pipeline.cli.search_commands import STRIP
from pipeline.explore.search import pages
from pipeline.explore.search.search import Search
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from pipeline.vision import clip
from tests import fake_run
from tests.explore import points
from tests.explore.conftest import picture
from tests.report.test_stage import Page

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def rows(searchable) -> list[dict]:
    """All samples, by id."""
    parts = [tables.read(searchable.embeddings.file(f"{s}.parquet")) for s in fake_run.STEMS]
    return [row for part in parts for row in part.to_pylist()]


@pytest.fixture
def asked(searchable, capfd, tmp_path, monkeypatch):
    """Runs the command in a folder of its own; (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.invoke(["search", "--root", searchable.root, *arguments])
        return code, *capfd.readouterr()

    return run


def test_a_sample_is_found_by_its_picture(searchable, rows, asked, tmp_path):
    for space in Space:
        file = tmp_path / "query.png"
        file.write_bytes(picture(searchable, rows[22]))
        code, out, _ = asked("--image", str(file), "--top", "3", "--space", space.value, "--json")
        found = json.loads(out)["hits"]
        assert code == 0 and len(found) == 3
        assert found[0]["sample_id"] == rows[22]["sample_id"] and found[0]["score"] > 0.999
        assert found[0]["tar_offset"] == rows[22]["tar_offset"]
        assert found[0]["shard_url"].endswith("/input/00001.tar")
    assert not (tmp_path / STRIP).exists()


def test_a_text_finds_what_the_model_says(rows, asked):
    code, out, _ = asked("--text", "a red square", "--top", "30", "--json")
    assert code == 0
    encoder = clip.load("pico-clip", "", device="cpu", precision="fp32")
    query = encoder.encode_texts(["a red square"], 1)
    x = np.array([row["embedding"] for row in rows], np.float32)
    order = points.exact(x, query, 30)[0]
    found = json.loads(out)["hits"]
    assert [row["sample_id"] for row in found] == [rows[i]["sample_id"] for i in order]
    assert [row["score"] for row in found] == pytest.approx((x @ query[0])[order], abs=1e-5)


def test_the_table_names_samples_and_the_strip_shows_them(asked, tmp_path):
    code, out, _ = asked("--text", "green", "--top", "30")
    assert code == 0 and "\x1b" not in out and "\u202e" not in out
    assert "00000/key0 " in out and "a picture, number 3" in out
    assert out.count("00001/key") == 15
    strip = tmp_path / STRIP
    assert f"pictures: {strip}" in out.replace("\n", "")
    page = Page(strip.read_text(encoding="utf-8"))
    assert len([s for s in page.all("img", "src") if s.startswith("data:image/webp;")]) == 30
    assert not [tag for tag, _ in page.tags if tag in ("script", "form", "a")]
    assert fake_run.SCRIPT in page.text and "⟨U+202E⟩reversed⟨U+001B⟩[31m" in page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", strip.read_text("utf-8"))


def test_one_cluster_alone(rows, asked):
    code, out, _ = asked("--text", "green", "--top", "20", "--cluster", "0", "--json")
    found = json.loads(out)["hits"]
    assert code == 0 and {row["cluster_id"] for row in found} == {0}
    assert len(found) == 9 and found[0]["cluster_caption"] == fake_run.SCRIPT


def test_a_sample_without_a_caption_has_an_empty_one(searchable):
    search = Search(searchable, [Space.CLIP])
    row = {"sample_id": "s", "shard": "00000", "tar_offset": 1, "tar_size": 2, "caption": None}
    assert search._hit(row, 0.5, 1).caption == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --image, --text or --sample"),
        (("--text", "a", "--image", "b"), "give either --image, --text or --sample"),
        (("--text", "  "), "the text is empty"),
        (("--text", "a dog", "--space", "z"), "search for texts with --space clip"),
        (("--image", "nowhere.png"), "nowhere.png cannot be read: No such file"),
        (("--text", "a", "--cluster", "3"), "no cluster 3; give 0 to 2"),
        (("--text", "a", "--top", "0"), "--top"),
        (("--text", "a", "--space", "pixels"), "--space"),
    ],
)
def test_mistakes_are_told(asked, arguments, message):
    code, out, err = asked(*arguments)
    assert (code, out) == (2, "") and message in err


def test_a_bad_picture_is_told(asked, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"<script>alert(1)</script>")
    code, _, err = asked("--image", "bad.png")
    assert code == 2 and "the image cannot be used: not_an_image" in err


def test_a_run_without_captions_is_told(searchable, tmp_path):
    with pytest.raises(UserError, match="run `ratecluster caption` first"):
        Search(fake_run.build(tmp_path, captions=False), [Space.CLIP])


def test_typical_members_come_in_their_order(searchable):
    search = Search(searchable, [])
    hits = search.typical(1)
    assert len(hits) == 10 and {hit.cluster_id for hit in hits} == {1}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert [hit.cluster_id for hit in search.most_typical([2, 0])] == [2, 0]


def test_json_and_table_of_nothing():
    assert pages.facts([]) == [] and pages.text([]).split() == [
        "score",
        "sample",
        "cluster",
        "alt",
        "text",
    ]
