"""The report's page in a browser: what moves when it is used, and that nothing leaves it."""

import re
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import expect

from pipeline.evaluate import settings as evaluate_settings
from pipeline.evaluate import stage as evaluate
from pipeline.report import stage as report
from tests import chromium, fake_run, many_clusters

pytestmark = [pytest.mark.slow, chromium.needs_chromium]
K = 1000


@pytest.fixture(scope="module")
def browser():
    with chromium.browser() as found:
        yield found


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """The page of a small run with everything, at its URL."""
    paths = fake_run.build(tmp_path_factory.mktemp("small"))
    fake_run.written(paths)
    evaluate.run(evaluate_settings.Config(), paths)
    return Path(report.run(report.Config(), paths)["page"]).as_uri()


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """The page of K clusters."""
    paths = many_clusters.build(tmp_path_factory.mktemp("k"), K)
    return Path(report.run(report.Config(), paths)["page"])


@pytest.fixture
def opened(browser):
    """(URL, settings of the window) -> (page, what it complained of and asked for)."""
    contexts = []

    def open_page(url, width=1280, **settings):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **settings))
        page = contexts[-1].new_page()
        watch = chromium.Watch(page)
        page.goto(url)
        return page, watch

    yield open_page
    for context in contexts:
        context.close()


def look_at_all(page) -> None:
    """Scroll to every chart, so that it is drawn."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator("canvas").first.wait_for()


def column(page, number: int) -> list[str]:
    return page.locator(f"#table tbody tr > :nth-child({number})").all_inner_texts()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 2000])
def test_page_is_whole_quiet_and_no_wider_than_the_window(opened, small, width, scheme):
    page, watch = opened(small, width, color_scheme=scheme)
    look_at_all(page)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator(".plot:has(canvas)").count() == 11
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (min(map(int, re.findall(r"\d+", ground))) > 128) == (scheme == "light")
    for part in ("clusters", "training", "truth"):
        page.locator(f"#{part}").evaluate("e => e.scrollIntoView({behavior: 'instant'})")
        page.wait_for_timeout(400)
        chromium.screenshot(page, f"report-{width}-{scheme}-{part}")
    assert watch.complaints == []
    assert watch.requests == [small]


def test_slider_cuts_the_tree_and_changes_the_table(opened, small):
    page, watch = opened(small)
    assert column(page, 3) == ["11", "10", "9"]
    page.locator("#cut").fill("2")
    expect(page.locator("#table tbody tr")).to_have_count(2)
    assert column(page, 1) == ["2+0", "1"] and column(page, 3) == ["20", "10"]
    assert page.locator("#cut-text").inner_text() == "2 clusters"
    assert page.locator("#shown").inner_text() == "2 unions of 3 clusters"
    page.locator("#cut").fill("3")
    expect(page.locator("#table tbody tr")).to_have_count(3)
    assert column(page, 3) == ["11", "10", "9"]
    assert watch.complaints == []


def test_bits_of_a_union_are_those_that_were_lost_more(opened, small):
    """L(A ∪ B) = L(A) + L(B) − saved − what its name saves."""
    page, _ = opened(small)
    page.locator("#cut").fill("2")
    expect(page.locator("#table tbody tr")).to_have_count(2)
    names = [-n * np.log2(n / 30) for n in (20, 9, 11)]
    bits = 112.5 + 159.5 + 300 - (names[0] - names[1] - names[2])
    assert column(page, 5)[0] == f"{bits / 20:.1f}"


def test_filters_filter_table_and_galleries(opened, small):
    page, _ = opened(small)
    page.locator("#filter").fill("LEAFY")
    assert column(page, 1) == ["1"]
    assert page.locator("article:visible").count() == 1
    page.locator("#filter").fill("red thing")  # the second caption of cluster 0
    assert column(page, 1) == ["0"]
    page.locator("#filter").fill("")
    page.locator("#least").fill("10")
    assert column(page, 1) == ["2", "1"]
    assert page.locator("#shown").inner_text() == "2 of 3 clusters"


def test_headers_sort_up_and_down_by_keyboard(opened, small):
    page, _ = opened(small)
    head = page.locator("#table thead th", has_text="Id")
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert column(page, 1) == ["0", "1", "2"] and head.get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert column(page, 1) == ["2", "1", "0"] and head.get_attribute("aria-sort") == "descending"
    page.locator("#table thead button", has_text="Caption").click()
    captions = column(page, 2)
    assert captions == sorted(captions, key=str.lower)
    assert page.locator("#table thead [aria-sort]").count() == 1


def test_slider_filter_and_zoom_work_by_keyboard(opened, small):
    page, watch = opened(small)
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.className")
        )
    assert {"skip", "cut", "filter", "least"} <= set(reached)
    page.locator("#cut").focus()
    outline = page.locator("#cut").evaluate("e => getComputedStyle(e).outlineStyle")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#cut-text")).to_contain_text("2 clusters")
    assert outline == "solid" or page.locator("#cut").evaluate("e => e.matches(':focus-visible')")
    look_at_all(page)
    page.locator("[data-zoom=map]").first.focus()
    page.keyboard.press("Enter")
    ends = page.evaluate(
        "echarts.getInstanceByDom(document.getElementById('plot-map')).getOption().dataZoom[0]"
    )
    assert (ends["start"], ends["end"]) == (25, 75)
    assert watch.complaints == []


def test_what_the_web_says_stays_text(opened, small):
    page, watch = opened(small)
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    look_at_all(page)
    page.locator("#cut").fill("1")
    expect(page.locator("#table tbody tr")).to_have_count(1)
    assert fake_run.SCRIPT in column(page, 2)[0]
    page.evaluate(
        "echarts.getInstanceByDom(document.getElementById('plot-map'))"
        ".dispatchAction({type: 'showTip', seriesIndex: 0, dataIndex: 2})"
    )
    tip = page.locator(".tip").first
    tip.wait_for()
    assert fake_run.SCRIPT in tip.inner_text()
    assert page.locator("script").count() == 4 and dialogs == [] and watch.complaints == []


def test_theme_is_changed_while_the_page_is_open(opened, small):
    page, watch = opened(small, color_scheme="light")
    look_at_all(page)
    ask = (
        "echarts.getInstanceByDom(document.getElementById('plot-training'))"
        ".getOption().series[0].lineStyle.color"
    )
    before = page.evaluate(ask)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert page.evaluate(ask) != before
    assert watch.complaints == []


@pytest.mark.parametrize("wish", ["reduce", "no-preference"])
def test_charts_move_only_where_that_is_welcome(opened, small, wish):
    page, _ = opened(small, reduced_motion=wish)
    look_at_all(page)
    chart = "echarts.getInstanceByDom(document.getElementById('plot-map'))"
    assert page.evaluate(f"{chart}.getOption().animation") == (wish == "no-preference")


def test_without_javascript_tables_and_galleries_are_there(opened, small):
    page, _ = opened(small, java_script_enabled=False)
    assert page.locator("#table tbody tr:visible").count() == 3
    assert page.locator("article img:visible").count() == 30
    assert page.locator(".plot:visible, .controls:visible, .zoom:visible").count() == 0
    assert page.locator("noscript").count() == 1


def test_a_thousand_clusters_fit_into_a_page(opened, large):
    assert large.stat().st_size < 15_000_000
    strips = sorted((large.parent / "galleries").iterdir())
    assert 0 < len(strips) < K
    page, watch = opened(large.as_uri())
    assert page.locator("#table tbody tr").count() == K
    assert not [url for url in watch.requests if "galleries" in url]  # none is looked at
    last = page.locator("article").last
    last.scroll_into_view_if_needed()
    image = last.locator("img").nth(3)
    image.scroll_into_view_if_needed()
    expect(image).to_have_js_property("naturalHeight", 24 * 96)
    loaded = [url for url in watch.requests if "galleries" in url]
    assert loaded and len(loaded) < 20
    assert all(url.startswith(large.parent.as_uri()) for url in watch.requests)
    page.locator("#cut").fill("40")
    expect(page.locator("#table tbody tr")).to_have_count(40)
    chromium.screenshot(page, "report-thousand-gallery")
    page.locator("#clusters").evaluate("e => e.scrollIntoView({behavior: 'instant'})")
    page.wait_for_timeout(800)
    chromium.screenshot(page, "report-thousand-clusters")
    assert watch.complaints == []
