"""serve, over HTTP, by the command: what it shows, and what it refuses."""

import http.client
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from pipeline.explore.search import serve
from pipeline.store import tables
from tests import fake_run
from tests.conftest import ROOT
from tests.explore.conftest import picture
from tests.report.test_stage import Page

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.ray
COMMAND = [sys.executable, "-c", "from pipeline.cli.main import main; main()", "serve"]


@pytest.fixture(scope="module")
def address(searchable) -> Iterator[str]:
    """Where the command listens."""
    command = [*COMMAND, "--root", searchable.root, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        line = child.stdout.readline()
        assert line.startswith("http://127.0.0.1:") and line.endswith("/  (Ctrl-C stops it)\n")
        yield line.split()[0]
        child.send_signal(signal.SIGINT)
        assert child.wait(30) == 0


@pytest.fixture
def request_(address):
    """Send a request as it is: (status, headers, text)."""

    def send(method: str, path: str, body: bytes = b"", **headers: str):
        line = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        line.request(method, path, body or None, named)
        answer = line.getresponse()
        text = answer.read().decode()
        line.close()
        return answer.status, dict(answer.getheaders()), text

    return send


def form(data: bytes, space: str | None = None, name: str = "file") -> tuple[bytes, str]:
    """A multipart form and its content type."""
    edge = "6f1d1c9e"  # the same in every process: it is in the names of tests
    parts = [(f'{name}"; filename="../../etc/passwd', data)]
    parts += [("space", space.encode())] if space is not None else []
    heads = [f'--{edge}\r\nContent-Disposition: form-data; name="{field}"' for field, _ in parts]
    pairs = zip(heads, parts, strict=True)
    body = b"".join(head.encode() + b"\r\n\r\n" + value + b"\r\n" for head, (_, value) in pairs)
    return body + f"--{edge}--\r\n".encode(), f"multipart/form-data; boundary={edge}"


def shown(text: str) -> list[str]:
    return [src for src in Page(text).all("img", "src") if src.startswith("data:image/webp;")]


def test_the_first_page_has_all_clusters_largest_first(request_):
    status, headers, text = request_("GET", "/")
    page = Page(text)
    assert status == 200 and "30 images in 3 clusters" in page.text
    links = [link for link in page.all("a", "href") if link.startswith("/cluster/")]
    assert links == ["/cluster/2", "/cluster/1", "/cluster/0"] and len(shown(text)) == 3
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script" not in headers["Content-Security-Policy"]
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Server"] == "ratecluster" and headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("asked", ["0", "-1", "99999999999999999999", "x", "%3Cscript%3E", "²"])
def test_any_page_number_is_a_page(request_, asked):
    status, _, text = request_("GET", f"/?page={quote(asked, safe='%')}")
    assert status == 200 and len(shown(text)) == 3


def test_a_text_finds_samples(request_):
    status, _, text = request_("GET", "/text?q=a%20red%20square")
    page = Page(text)
    assert status == 200 and "Most similar to “a red square”" in page.text
    assert len(shown(text)) == 24


def test_a_text_may_be_any_bytes(request_):
    assert request_("GET", "/text?q=%ff%00%ed%a0%80%0d%0aSet-Cookie:x")[0] == 200


def test_what_is_asked_comes_back_as_text(request_):
    asked = '"><script>alert(2)</script><img src=x onerror=alert(3)>'
    _, _, text = request_("GET", f"/text?q={quote(asked)}")
    page = Page(text)
    assert asked in page.text and asked in page.all("input", "value")
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]


@pytest.mark.parametrize("space", [None, "clip", "z"])
def test_a_picture_finds_itself(request_, searchable, space):
    row = tables.read(searchable.embeddings.file("00001.parquet")).to_pylist()[4]
    body, kind = form(picture(searchable, row), space)
    status, _, text = request_("POST", "/image", body, Content_Type=kind)
    page = Page(text)
    assert status == 200 and "Most similar to your image" in page.text
    assert page.text.index(row["sample_id"]) < page.text.index("00000/")
    assert "1.000" in page.text


def test_a_cluster_shows_its_typical_members_and_hostile_captions_as_text(request_):
    _, _, text = request_("GET", "/cluster/0")
    page = Page(text)
    assert "9 samples; the most typical" in page.text and len(shown(text)) == 9
    assert fake_run.SCRIPT in page.text and "<script" not in text
    _, _, text = request_("GET", "/cluster/2")
    assert "blue⟨U+202E⟩ thing⟨U+001B⟩[2J" in Page(text).text and "\u202e" not in text


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/cluster/3", 400),
        ("/cluster/999999999", 400),
        ("/cluster/9999999999", 404),
        ("/cluster/..%2f..%2fetc", 404),
        ("/../../etc/passwd", 404),
        ("/text", 400),
        ("/text?q=%20", 400),
        ("/image", 405),
        ("/favicon.ico", 404),
    ],
)
def test_what_is_not_there_is_a_page_that_says_so(request_, path, status):
    found, headers, text = request_("GET", path)
    assert found == status and Page(text).all("form", "action")
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_are_refused(request_, method):
    assert request_(method, "/")[0] == 405


BOMB = b"BM" + b"\0" * 12 + b"\x28\0\0\0" + b"\xff\xff\0\0" * 2 + b"\x01\0\x18\0" + b"\0" * 24


@pytest.mark.parametrize(
    ("data", "output"),
    [
        (b"", "empty"),
        (b"<script>alert(1)</script>", "not_an_image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "corrupt"),
        (BOMB, "too_large: 65535x65535 pixels"),
    ],
)
def test_bad_pictures_are_told(request_, data, output):
    body, kind = form(data)
    status, _, text = request_("POST", "/image", body, Content_Type=kind)
    assert status == 400 and output in Page(text).text


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "multipart/form-data; boundary=x"),
        (b"garbage", "multipart/form-data; boundary=x"),
        (b"garbage", "multipart/form-data"),
        (b"--x\r\n\r\n", "multipart/form-data; boundary=x"),
        (b"file=abc", "application/x-www-form-urlencoded"),
        (b"file=%ff%fe", "application/x-www-form-urlencoded"),
        (b"{}", "application/json"),
        (*form(b"x", name="other"),),
        (*form(b"x", space="../clip"),),
    ],
)
def test_bad_forms_are_told(request_, body, kind):
    status, _, text = request_("POST", "/image", body, Content_Type=kind)
    assert status == 400 and "The request failed" in Page(text).text


def test_an_upload_has_a_limit(request_):
    body, kind = form(b"\0" * (serve.UPLOAD_BYTES + 1))
    status, _, text = request_("POST", "/image", body, Content_Type=kind)
    assert status == 413 and "Too Large" in Page(text).text


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("127.0.0.1@evil.example", 403),
        ("[", 403),
        ("", 403),
    ],
)
def test_foreign_names_are_refused(request_, host, status):
    found, _, text = request_("GET", "/", Host=host)
    assert found == status and ("clusters" in text) == (status == 200)


@pytest.mark.parametrize(
    ("site", "status"),
    [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)],
)
def test_forms_of_other_sites_are_refused(request_, searchable, site, status):
    row = tables.read(searchable.embeddings.file("00000.parquet")).to_pylist()[0]
    body, kind = form(picture(searchable, row))
    headers = {"Content_Type": kind, "Sec_Fetch_Site": site}
    assert request_("POST", "/image", body, **headers)[0] == status


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.9", "::1", "localhost"])
def test_on_loopback_names_are_known(host):
    assert host in (serve.loopback_names(host) or ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "my-machine"])
def test_on_a_network_any_name_is_taken(host):
    assert serve.loopback_names(host) is None


def test_pages_of_clusters():
    asked = ["", "0", "1", "2", "7", "8", "²", "-3", "1e3", "9" * 5000]
    assert [serve.page_number(text, 7) for text in asked] == [1, 1, 1, 2, 7, 7, 1, 1, 1, 1]


def test_a_port_that_is_taken_is_told(address, searchable):
    port = str(urlsplit(address).port)
    command = [*COMMAND, "--root", searchable.root, "--port", port]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in done.stderr


def test_a_run_without_an_index_is_told(tmp_path):
    root = fake_run.build(tmp_path).root
    done = subprocess.run([*COMMAND, "--root", root], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and f"ratecluster index --root {root}" in done.stderr


@pytest.mark.skipif(not CHROMIUM.exists(), reason="no /usr/bin/chromium")
def test_in_a_browser(address, searchable, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api")
    row = tables.read(searchable.embeddings.file("00000.parquet")).to_pylist()[5]
    (tmp_path / "query.png").write_bytes(picture(searchable, row))
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for scheme, width in (("light", 1200), ("dark", 400)):
            page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 900})
            _use(page, address, tmp_path / "query.png", row["sample_id"])
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.close()
        browser.close()


def _use(page, address: str, query: Path, sample_id: str) -> None:
    """Search by text with the keyboard, by picture, look at a cluster with a hostile name."""
    output, requests = [], []
    page.on("console", lambda message: output.append(message.text))
    page.on("pageerror", lambda error: output.append(str(error)))
    page.on("dialog", lambda dialog: output.append(dialog.message))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    _photograph(page, "home")
    page.keyboard.press("Tab")  # the link to all clusters
    page.keyboard.press("Tab")
    page.keyboard.type("a red square")
    page.keyboard.press("Enter")
    page.wait_for_selector("text=Most similar to “a red square”")
    assert page.locator("img").count() == 24
    assert page.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    _photograph(page, "text")
    page.set_input_files("input[type=file]", str(query))
    page.select_option("select", "z")
    page.get_by_role("search", name="By image").get_by_role("button", name="Search").click()
    page.wait_for_selector("text=Most similar to your image")
    assert sample_id in page.locator("figcaption").first.inner_text()
    page.goto(f"{address}cluster/0")
    assert page.locator("h1").inner_text() == fake_run.SCRIPT
    assert page.evaluate("document.scripts.length") == 0
    assert output == []
    assert all(url.startswith((address, "data:")) for url in requests)


def _photograph(page, name: str) -> None:
    """For looking at, where a folder for it is named."""
    if folder := os.environ.get("SCREENSHOTS"):
        width = page.viewport_size["width"]
        page.screenshot(path=f"{folder}/serve-{name}-{width}.png", full_page=True)
