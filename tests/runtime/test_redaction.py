"""No secret of a URL or of the environment is written or printed by any part of a real run."""

import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from pipeline.cli import main as cli
from pipeline.runtime import config, redaction
from pipeline.runtime.errors import UserError
from pipeline.store import retry, storage
from pipeline.vision import vocabulary
from tests.conftest import ROOT, run_arguments

SECRET = "Zq7/tr+ULTRAs3cret"


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIAKEY:{SECRET}@bucket/0.tar",
        f"https://me:{SECRET}@host/0.tar",
        f"https://me:{SECRET}@host:8080/0.tar",
        f"sftp://me:{SECRET}@host/shards",
        f"https://host/0.tar?X-Amz-Signature={SECRET}",
        f"https://host/0.tar?download=true&sig={SECRET}",
        f"https://host/0.tar?anything={SECRET}",
        f"az://container/0.tar?sv=2022&sig={SECRET}",
    ],
)
def test_secrets_in_urls_are_refused_and_not_said(url):
    for use in (storage.locate, storage.read_bytes, redaction.resolved):
        with pytest.raises(UserError, match="put it into an environment variable") as caught:
            use(url)
        assert SECRET not in str(caught.value) and SECRET not in redaction.redacted(url)
    with pytest.raises(UserError, match="environment variable"):
        vocabulary.load([url])


@pytest.mark.parametrize(
    "url",
    [
        "s3://bucket/a:b@c.tar",
        "https://host:8080/a@b.tar",
        "s3://bucket/0000?.tar",
        "https://host/0.tar?download=true",
        "hf://datasets/me/it@main/0.tar",
        "abfs://container@account.dfs.core.windows.net/0.tar",
        "sftp://me@host/shards",
        "memory://x/y",
    ],
)
def test_other_urls_stay_as_they_are(url):
    assert redaction.resolved(url) == redaction.redacted(url) == url


def test_variables_are_put_in_where_a_url_is_opened(monkeypatch):
    monkeypatch.setenv("QUERY", f"sv=2022&sig={SECRET}")
    monkeypatch.setenv("PW", SECRET)
    assert redaction.resolved("https://h/0.tar?$QUERY") == f"https://h/0.tar?sv=2022&sig={SECRET}"
    assert redaction.resolved("sftp://me:$PW@h/x") == f"sftp://me:{SECRET}@h/x"
    for url in ("https://h/0.tar?$QUERY", "sftp://me:$PW@h/x", "https://h/0.tar?sig=$PW"):
        assert redaction.redacted(url) == url
        assert SECRET not in redaction.redacted(f"cannot open {redaction.resolved(url)}: no")
    assert redaction.resolved("/local/$PW?token=$PW") == "/local/$PW?token=$PW"
    with pytest.raises(UserError, match="variable NOT_SET is not set"):
        redaction.resolved("https://h/0.tar?$NOT_SET")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"GET /0.tar?X-Amz-Signature={SECRET}&x=1", "GET /0.tar?X-Amz-Signature=…&x=1"),
        (f"url=URL('https://u:{SECRET}@h/x?a={SECRET}')", "url=URL('https://…@h/x?a=…')"),
        ("RAY_AUTH_TOKEN_PATH is not set", "RAY_AUTH_TOKEN_PATH is not set"),
        ("embed.model=ViT-L-14 of https://h/x?download=1", None),
    ],
)
def test_texts(text, expected):
    assert redaction.redacted(text) == (expected or text)


def test_values_of_secret_variables_are_not_said(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("MY_TOKEN_PATH", "/home/me/token")
    assert redaction.redacted(f"signed with {SECRET}, see /home/me/token") == (
        "signed with …, see /home/me/token"
    )


def test_errors_of_a_store_are_raised_without_secrets(monkeypatch):
    monkeypatch.setattr(retry.time, "sleep", lambda s: None)

    class Client(Exception):  # noqa: N818
        """As of a client that quotes the URL; its text is not in its arguments."""

        def __str__(self) -> str:
            return f"403 https://h/x?sig={SECRET}"

    for error, kind in [
        (Client(), OSError),
        (FileNotFoundError(f"https://h/x?sig={SECRET}"), FileNotFoundError),
        (OSError(f"https://u:{SECRET}@h/x"), OSError),
    ]:

        def fail(error=error):
            raise error

        with pytest.raises(kind) as caught:
            storage.retry(fail)
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        assert "h/x" in str(caught.value)


def test_fingerprints_do_not_know_the_signature(monkeypatch):
    """Only stem, size and version of a shard are in them: `embed.identity`."""
    before = config.digest({}, ["0", 5, "etag"])
    monkeypatch.setenv("QUERY", SECRET)
    assert config.digest({}, ["0", 5, "etag"]) == before


# ---- the command line


class Signed(http.server.BaseHTTPRequestHandler):
    """Serves a folder to those who know the signature."""

    folder = Path()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = self.folder / url.path.lstrip("/")
        if parse_qs(url.query).get("sig") != [SECRET]:
            return self.send_error(403)
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or len(data))) if asked else (0, len(data))
        piece = data[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"1"')
        if asked:
            end = first + len(piece) - 1
            self.send_header("Content-Range", f"bytes {first}-{end}/{len(data)}")
        self.send_header("Content-Length", str(len(piece)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(piece)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tiny_shards):
    handler = type("Handler", (Signed,), {"folder": tiny_shards})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{served.server_port}"
        served.shutdown()


@pytest.fixture
def ray_files():
    """Where the command's Ray writes its logs: a short path, for its sockets."""
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def command(arguments: list[str], ray_files: Path, **variables: str) -> tuple[int, str]:
    """Exit code, and the output of the real command."""
    known = {"AWS_SECRET_ACCESS_KEY": SECRET, "HF_TOKEN": SECRET, "PYTHONPATH": str(ROOT)}
    known |= {"RAY_TMPDIR": str(ray_files), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", "from pipeline.cli.main import main; main()", *arguments],
        env={**os.environ, **known, **variables},
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout + done.stderr


def holding(folder: Path, *secrets: str) -> list[str]:
    """Files below a folder that hold a secret, as it is or escaped."""
    forms = [s.encode() for secret in secrets for s in (secret, secret.replace("/", "%2F"))]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(form in path.read_bytes() for form in forms)]


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_of_signed_urls_writes_and_says_no_secret(server, tmp_path, ray_files):
    shards = f"{server}/{{00000..00001}}.tar?$SHARD_QUERY"
    arguments = run_arguments(Path("unused"), tmp_path / "run")
    arguments[arguments.index("--shards") + 1] = shards
    escaped = SECRET.replace("/", "%2F").replace("+", "%2B")
    code, message = command(arguments, ray_files, SHARD_QUERY=f"se=2030&sig={escaped}")
    assert code == 0, message
    assert (tmp_path / "run" / "labeled" / "00001.tar").stat().st_size > 0
    forms = (SECRET, escaped, escaped.partition("%")[2])
    assert holding(tmp_path, *forms) == [] == holding(ray_files, *forms)
    assert not any(form in message for form in forms)
    manifest = (tmp_path / "run" / "embeddings" / "manifest.json").read_text()
    assert f"{server}/00000.tar?$SHARD_QUERY" in manifest

    renewed = f"se=2040&sig={escaped}"
    code, message = command(arguments, ray_files, SHARD_QUERY=renewed)
    assert code == 0 and message.count("already done") == 7, message


@pytest.mark.slow
def test_what_fails_says_no_secret(server, tmp_path, ray_files):
    """By a command whose Ray writes its own files."""
    arguments = ["embed", "--shards", f"{server}/00000.tar?$Q", "--root", str(tmp_path / "run")]
    code, message = command(arguments, ray_files, Q=f"sig=Wr0ng/{SECRET}")
    assert code == 2 and message.strip(), message
    assert SECRET not in message
    assert holding(tmp_path, SECRET) == [] == holding(ray_files, SECRET)


@pytest.mark.parametrize(
    ("shards", "root"),
    [
        (f"SERVER/00000.tar?sig={SECRET}", "ROOT"),
        (f"SERVER/{{00000.tar?sig={SECRET}", "ROOT"),
        (f"s3://AKIA:{SECRET}@bucket/0.tar", "ROOT"),
        (f"http://me:{SECRET}@127.0.0.1:1/0.tar", "ROOT"),
        ("SERVER/00000.tar?$NOT_THERE", "ROOT"),
        ("", f"sftp://me:{SECRET}@127.0.0.1/run"),
    ],
)
def test_what_is_refused_says_no_secret(server, tmp_path, monkeypatch, capfd, shards, root):
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, SECRET)
    shards = shards.replace("SERVER", server)
    words = ["embed", "--shards", shards] if shards else ["verify"]
    code = cli.invoke([*words, "--root", root.replace("ROOT", str(tmp_path / "run"))])
    message = "".join(capfd.readouterr())
    assert code == 2 and message.strip(), message
    assert SECRET not in message
    assert holding(tmp_path, SECRET) == []


def test_a_bare_query_is_a_secret_and_long_texts_are_quick():
    with pytest.raises(UserError, match="may be a secret"):
        redaction.resolved("https://h/x.tar?SECRETSECRET123")
    assert (
        redaction.redacted("at https://h/x.tar?SECRETSECRET123 now") == "at https://h/x.tar?… now"
    )
    assert redaction.redacted("token" * 20_000) == "token" * 20_000  # minutes, once
    assert redaction.redacted("a" * 100_000) == "a" * 100_000
