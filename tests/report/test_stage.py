"""The report: one page, all of the run in it, nothing of the web's texts acting in it.

How the page behaves in a browser is test_report_page.py.
"""

import base64
import io
import json
import logging
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.artifacts import schemas
from pipeline.evaluate import settings as evaluate_settings
from pipeline.evaluate import stage as evaluate
from pipeline.report import settings
from pipeline.report import stage as report
from pipeline.runtime.errors import UserError
from pipeline.store import tables
from tests import fake_run, level_tables


class Page(HTMLParser):
    """Tags with their attributes, and the text of a page that is no script or style."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.ids, self.texts = [], set(), []
        self.codes = {"script": [], "style": []}
        self.feed(text)
        self.text = " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids.add(dict(attrs).get("id"))

    def handle_data(self, data):
        self.codes.get(self.cdata_elem, self.texts).append(data)

    def all(self, tag, name):
        return [attrs[name] for found, attrs in self.tags if found == tag and name in attrs]


@pytest.fixture
def paths(tmp_path):
    return fake_run.build(tmp_path)


def made(paths, **config) -> str:
    return Path(report.run(report.Config(**config), paths)["page"]).read_text(encoding="utf-8")


def pictures(page: Page) -> list[str]:
    return [src for src in page.all("img", "src") if src.startswith("data:image/webp")]


def test_the_table_says_how_sure_each_caption_is(paths):
    rows = tables.read(paths.captions.file("captions.parquet"))
    sure = rows.set_column(3, "share", pa.array([0.81, 0.4, 0.32, 0.07], pa.float32()))
    tables.write(paths.captions.file("captions.parquet"), sure)
    table = made(paths).partition('<table id="table">')[2].partition("</table>")[0]
    for cluster, share in enumerate(("81.0", "32.0", "7.0")):
        row = next(line for line in table.splitlines() if f'data-cluster="{cluster}"' in line)
        assert f'title="How sure the caption is">{share}\xa0%</span>' in row


def test_page_says_what_the_run_found(paths):
    page = Page(made(paths))
    assert "3 clusters in 30 images" in page.text
    assert "in 2 shards, 1 damaged" in page.text
    assert "damaged at 512" in page.text
    assert "for all stages 5.0 s" in page.text
    assert "embed 1.5 32 21 embeddings-1 train 2.5 50 steps 124 network-1" in page.text
    assert "a picture, number 14 00001/key14" in page.text
    assert len(pictures(page)) == 30 + 3  # and those at the top
    assert "Comparison with true classes" not in page.text


def test_one_of_a_thing_is_said_as_one():
    assert [report.counted(n, "image") for n in (0, 1, 2000)] == [
        "0 images",
        "1 image",
        "2,000 images",
    ]


def test_every_link_leads_somewhere_in_the_page(paths):
    fake_run.written(paths)
    page = Page(made(paths))
    links = page.all("a", "href")
    assert {"#cluster-0", "#cluster-1", "#cluster-2"} <= set(links)
    assert {link.removeprefix("#") for link in links} <= page.ids


def test_levels_open_from_coarse_to_fine(paths):
    fake_run.written(paths)
    assert 'id="levels"' not in made(paths)  # there is one
    level_tables.write(paths, np.eye(3, fake_run.FEATURES), [[0, 0], [0, 1], [1, 2]])
    fake_run.refinish(paths.clusters, levels=[2, 3], fingerprint="clusters-2")
    fake_run.refinish(paths.captions, upstream="clusters-2", fingerprint="captions-2")
    fake_run.refinish(paths.labels, upstream="captions-2", fingerprint="labels-2")
    places = [(1, 0, None), (1, 1, None), (2, 0, 0), (2, 1, 0), (2, 2, 1)]
    rows = [
        {"level": level, "cluster_id": cluster, "parent": parent, "size": 10}
        | {"cluster_caption": f"{fake_run.SCRIPT} {level} {cluster}", "share": 0.5}
        for level, cluster, parent in places
    ]
    table = pa.Table.from_pylist(rows, schema=schemas.LEVELS)
    tables.write(paths.top.file("levels.parquet"), table)
    html = made(paths)
    assert fake_run.SCRIPT not in html
    text = Page(html.partition('id="levels"')[2].partition("</section>")[0]).text
    assert "2 → 3 clusters" in text
    parts = f"{fake_run.SCRIPT} 10 green & <b>leafy</b> 10"
    assert f"{fake_run.SCRIPT} 1 0 10 {parts}" in text
    assert f"{fake_run.SCRIPT} 1 1" not in text  # its only part is shown in its place


def test_texts_of_the_web_are_escaped(paths):
    fake_run.written(paths)
    evaluate.run(evaluate_settings.Config(), paths)
    html = made(paths)
    assert fake_run.SCRIPT not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "<b>leafy" not in html
    page = Page(html)
    assert not any(n.startswith("on") for _, attrs in page.tags for n in attrs)
    assert any(fake_run.SCRIPT in alt and '"quoted"' in alt for alt in page.all("img", "alt"))
    data = json.loads(page.codes["script"][0])
    assert data["clusters"][0]["name"] == fake_run.SCRIPT


def test_the_policy_knows_every_script_and_style(paths):
    html = made(paths)
    page = Page(html)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv")]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and "unsafe" not in policy
    assert rules["img-src"] == "data:"
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert rules["script-src"].split() == [report.digest(t) for t in page.codes["script"][1:]]
    assert rules["style-src"].split() == [report.digest(t) for t in page.codes["style"]]


def test_unseen_characters_become_visible(paths):
    html = made(paths)
    ours = html.partition("<script>")[0]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", ours)
    assert "blue\\u27e8U+202E\\u27e9 thing" in ours  # in the data of the scripts, too
    assert "not_an_image: ⟨U+001B⟩[31mred alert" in html
    assert "blue⟨U+202E⟩ thing⟨U+001B⟩[2J" in html


def test_page_needs_nothing_but_itself(paths):
    html = made(paths)
    page = Page(html)
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    assert not page.all("script", "src")
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "object", "embed", "form")]
    assert "url(" not in "".join(page.codes["style"])
    texts = [a["alt"] for tag, a in page.tags if tag == "img"]
    assert texts.count("") == 3  # at the top, where a name stands below


def test_thumbnails_are_small_pictures_of_the_members(paths):
    page = Page(made(paths, thumbnail=48))
    data = base64.b64decode(pictures(page)[-1].partition(",")[2])
    image = Image.open(io.BytesIO(data))
    assert image.size == (48, 32)
    red, green, blue = image.convert("RGB").getpixel((20, 15))
    assert red > 150 > max(green, blue)  # the last section is that of the smallest cluster


def test_gallery_and_max_clusters_limit_what_is_shown(paths, monkeypatch):
    monkeypatch.setattr(settings, "EDGES", 0)
    page = Page(made(paths, gallery=2, max_clusters=1))
    assert len(pictures(page)) == 1 + 2
    assert {"cluster-2"} == {i for i in page.ids if i and i.startswith("cluster-")}
    assert "#cluster-0" not in page.all("a", "href")
    assert len(pictures(Page(made(paths, gallery=0)))) == 0


def test_kinds_of_members_are_apart(paths, monkeypatch):
    monkeypatch.setattr(settings, "EDGES", 2)
    page = Page(made(paths, gallery=2))
    kinds = ("Typical closest to", "Borderline close to", "Odd farthest from")
    assert [page.text.count(kind) for kind in kinds] == [3, 3, 3]
    names = re.findall(r"\d+/key\d+", page.text)
    assert len(names) == len(set(names)) == 3 * 6  # none twice


def test_a_missing_shard_leaves_boxes_and_one_warning(paths, caplog, tmp_path):
    shard = tmp_path / "input" / "00000.tar"
    shard.rename(tmp_path / "moved.tar")
    html = made(paths)
    assert html.count("no longer readable") == 15  # of 30: once for each
    warnings = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "15 of 30 images" in warnings[0]
    assert "00000.tar" in warnings[0]
    (tmp_path / "moved.tar").rename(shard)
    assert len(pictures(Page(made(paths)))) == 33  # not done while pictures are missing


def test_a_changed_shard_leaves_boxes(paths, tmp_path):
    (tmp_path / "input" / "00001.tar").write_bytes(b"something else")
    assert made(paths).count("no longer readable") == 15


def test_clusters_table_and_evaluation_are_shown_once_they_are_there(paths):
    before = Page(made(paths)).text
    fake_run.written(paths)
    evaluate.run(evaluate_settings.Config(), paths)
    after = Page(made(paths)).text
    for text in ("Nearest clusters", "Most common true class", "96.6", "Accuracy by confidence"):
        assert text not in before
        assert text in after


def test_an_evaluation_of_before_has_no_pictures(paths):
    evaluate.run(evaluate_settings.Config(baseline=False), paths)
    result = json.loads(Path(paths.evaluation_json).read_text())
    old = {name: value for name, value in result.items() if name != "confusion"}
    Path(paths.evaluation_json).write_text(json.dumps(old))
    text = Page(made(paths)).text
    assert "Comparison with true classes" in text and "Accuracy by confidence" not in text


def test_exemplars_of_before_are_refused_with_what_to_do(paths):
    url = paths.clusters.file("exemplars.parquet")
    tables.write(url, tables.read(url).drop_columns(["kind", "margin"]))
    with pytest.raises(UserError, match=r"delete clusters/manifest\.json"):
        report.run(report.Config(), paths)


def test_evaluation_of_other_clusters_is_left_out(paths, caplog):
    evaluate.run(evaluate_settings.Config(), paths)
    fake_run.refinish(paths.clusters, fingerprint="clusters-2")
    fake_run.refinish(paths.captions, upstream="clusters-2")
    assert "Comparison with true classes" not in Page(made(paths)).text
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
    assert "All samples of all shards were read." in page.text


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
    wrong = ({"gallery": -1}, {"max_clusters": -1}, {"thumbnail": 0})
    for config in (*wrong, {"thumbnail": 257}):
        with pytest.raises(UserError, match=r"report\."):
            report.Config(**config)


def test_contrast_of_text_and_of_marks_is_that_of_wcag_aa():
    """4.5 of text, 3 of what must be seen of controls and charts, in both themes."""
    style = resources.files("pipeline.report").joinpath("page.css").read_text("utf-8")
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    for theme in (light, dark):
        colour = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", theme))
        for ground in ("ground", "paper"):
            for text in ("ink", "soft", "accent", "warm", "green"):
                assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)
            marks = ("control", "quiet", "violet", *(f"c{i}" for i in range(10)))
            for mark in marks:
                assert contrast(colour[mark], colour[ground]) >= 3, (mark, ground)
        for text, ground in (
            ("ink", "wash"),
            ("soft", "wash"),
            ("accent", "wash"),
            ("soft", "tile"),
        ):
            assert contrast(colour[text], colour[ground]) >= 4.5, (text, ground)


def contrast(a: str, b: str) -> float:
    """The contrast ratio of WCAG 2, 1 to 21."""
    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def test_contrast_by_its_closed_form():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)
