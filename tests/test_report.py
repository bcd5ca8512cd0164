"""The report: one page, all of the run in it, nothing of the web's texts acting in it."""

import base64
import io
import logging
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from pipeline import evaluate, figures, report
from pipeline.errors import UserError
from pipeline.store import tables
from tests import fake_run


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.texts = [], set(), []
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids.add(dict(attrs).get("id"))

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, name):
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]


@pytest.fixture
def paths(tmp_path):
    return fake_run.build(tmp_path)


def made(paths, **settings) -> str:
    return Path(report.run(report.Config(**settings), paths)).read_text(encoding="utf-8")


def pictures(page: Page) -> list[str]:
    return [src for src in page.all("img", "src") if src.startswith("data:image/webp")]


def test_page_says_what_the_run_found(paths):
    page = Page(made(paths))
    assert "3 clusters in 30 images" in page.text
    assert "in 2 shards, 1 damaged" in page.text
    assert "damaged at 512" in page.text
    assert "embed 1.5, train 2.5, select_k 0.7, caption 0.3" in page.text
    assert "a picture, number 14" in page.text
    assert len(pictures(page)) == 30
    assert "Evaluation" not in page.text


def test_every_link_leads_somewhere_in_the_page(paths):
    fake_run.written(paths)
    page = Page(made(paths))
    links = page.all("a", "href")
    assert {"#cluster-0", "#cluster-1", "#cluster-2"} <= set(links)
    assert {link.removeprefix("#") for link in links} <= page.ids


def test_texts_of_the_web_are_escaped(paths):
    fake_run.written(paths)
    evaluate.run(evaluate.Config(), paths)
    html = made(paths)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>leafy" not in html
    page = Page(html)
    assert not any(tag == "script" or any(n.startswith("on") for n in a) for tag, a in page.tags)
    assert any(fake_run.SCRIPT in alt and '"quoted"' in alt for alt in page.all("img", "alt"))


def test_unseen_characters_become_visible(paths):
    html = made(paths)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", html)
    assert "not_an_image: ⟨U+001B⟩[31mred alert" in html
    assert "blue⟨U+202E⟩ thing⟨U+001B⟩[2J" in html


def test_page_needs_nothing_but_itself(paths):
    html = made(paths)
    page = Page(html)
    sources = page.all("img", "src") + page.all("source", "srcset")
    assert all(source.startswith("data:image/") for source in sources)
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "form")]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert "url(" not in html
    assert all(alt for alt in page.all("img", "alt"))


def test_thumbnails_are_small_pictures_of_the_members(paths):
    page = Page(made(paths, thumbnail=48))
    data = base64.b64decode(pictures(page)[-1].partition(",")[2])
    image = Image.open(io.BytesIO(data))
    assert image.size == (48, 32)
    red, green, blue = image.convert("RGB").getpixel((20, 15))
    assert red > 150 > max(green, blue)  # the last section is that of the smallest cluster


def test_gallery_and_max_clusters_limit_what_is_shown(paths):
    page = Page(made(paths, gallery=2, max_clusters=1))
    assert len(pictures(page)) == 2
    assert {"cluster-2"} == {i for i in page.ids if i and i.startswith("cluster-")}
    assert "#cluster-0" not in page.all("a", "href")
    assert len(pictures(Page(made(paths, gallery=0)))) == 0


def test_a_missing_shard_leaves_boxes_and_one_warning(paths, caplog, tmp_path):
    shard = tmp_path / "input" / "00000.tar"
    shard.rename(tmp_path / "moved.tar")
    html = made(paths)
    assert html.count("cannot be read any more") == 15
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "15 of 30 pictures" in warnings[0]
    assert "00000.tar" in warnings[0]
    (tmp_path / "moved.tar").rename(shard)
    assert len(pictures(Page(made(paths)))) == 30  # not done while pictures are missing


def test_a_changed_shard_leaves_boxes(paths, tmp_path):
    (tmp_path / "input" / "00001.tar").write_bytes(b"something else")
    assert made(paths).count("cannot be read any more") == 15


def test_clusters_table_and_evaluation_are_shown_once_they_are_there(paths):
    before = Page(made(paths)).text
    fake_run.written(paths)
    evaluate.run(evaluate.Config(), paths)
    after = Page(made(paths)).text
    for text in ("14.5", "Nearest clusters", "Commonest true class", "96.6"):
        assert text not in before
        assert text in after


def test_evaluation_of_other_clusters_is_left_out(paths, caplog):
    evaluate.run(evaluate.Config(), paths)
    fake_run.refinish(paths.clusters, fingerprint="clusters-2")
    fake_run.refinish(paths.captions, upstream="clusters-2")
    assert "Evaluation" not in Page(made(paths)).text
    assert "run evaluate again" in caplog.text


def test_clusters_without_caption_or_members_are_shown(paths):
    url = paths.captions.file("captions.parquet")
    table = tables.read(url)
    tables.write(url, table.filter([c != 1 for c in table["cluster_id"].to_pylist()]))
    url = paths.clusters.file("exemplars.parquet")
    tables.write(url, tables.read(url).slice(0, 0))
    assert "(no caption)" in Page(made(paths)).text


def test_nothing_rejected_is_said(paths):
    shards = paths.embeddings.manifest()["shards"]
    whole = [{**shard, "rejected": 0, "end": "complete"} for shard in shards]
    fake_run.refinish(paths.embeddings, rejected=0, reasons={}, shards=whole)
    page = Page(made(paths))
    assert "Every sample of every shard could be read." in page.text


@pytest.mark.parametrize(
    ("folder", "command"),
    [
        ("embeddings", "embed"),
        ("network", "train"),
        ("clusters", "select-k"),
        ("captions", "caption"),
    ],
)
def test_an_unfinished_stage_is_named(paths, folder, command):
    paths.folder(folder).clear()
    with pytest.raises(UserError, match=f"run `ratecluster {command}` first"):
        report.run(report.Config(), paths)


def test_same_inputs_same_bytes_and_done_is_done(paths, caplog):
    caplog.set_level(logging.INFO)
    first = made(paths)
    assert made(paths) == first
    assert "already done" in caplog.messages[-1]
    paths.report.clear()
    assert made(paths) == first


def test_wrong_settings_are_refused():
    for settings in ({"gallery": -1}, {"max_clusters": -1}, {"thumbnail": 0}):
        with pytest.raises(UserError, match=r"report\."):
            report.Config(**settings)


def test_figures_of_one_cluster_and_of_very_many(paths):
    curve = tables.read(paths.clusters.file("curve.parquet"))
    chosen = {"samples": 30, "k": 1, "flat_from": 1, "flat_to": 1}
    figures.themed(figures.coding_length, curve.slice(0, 1), chosen)
    figures.themed(figures.sizes, [30])
    figures.themed(figures.sizes, [10_000 // rank for rank in range(1, 1001)])
    history = tables.read(paths.network.file("history.parquet"))
    figures.themed(figures.training, history.slice(0, 2))
    figures.themed(figures.looks, [{"step": 0, "information": 0.0}])
