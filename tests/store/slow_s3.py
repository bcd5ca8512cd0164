"""An S3 server that answers late, refuses and counts: moto behind a layer of our own, over HTTP.

In a test: `with SlowS3() as server`. In a process of its own, for benchmarks:

    python -m tests.store.slow_s3 --latency 0.05

It prints its URL, and answers /_asked with the requests since the last time, as JSON.
"""

import argparse
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs

import boto3
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

SLOW_DOWN = (
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
KEYS = {"AWS_ACCESS_KEY_ID": "fake", "AWS_SECRET_ACCESS_KEY": "fake"}


def kind(environ: dict[str, Any]) -> str:
    """What a request asks for: its method, or LIST, BULK-DELETE, a step of an upload."""
    method, query = environ["REQUEST_METHOD"], parse_qs(environ["QUERY_STRING"], True)
    if method == "GET" and "list-type" in query:
        return "LIST"
    if method == "POST" and "delete" in query:
        return "BULK-DELETE"
    if "uploadId" in query:
        return {"PUT": "PART", "POST": "COMPLETE", "DELETE": "ABORT"}.get(method, method)
    return "UPLOAD" if "uploads" in query and method == "POST" else method


class SlowS3:
    """The server, on a port of its own; its faults may be changed while it runs."""

    def __init__(self, latency_s: float = 0.0) -> None:
        self.latency_s = latency_s  # before every answer
        self.refuses: Callable[[str, int], bool] = lambda kind, number: False  # with SlowDown
        self.replies: dict[str, bytes] = {}  # kind -> the answer, in the store's place
        self.asked: Counter[str] = Counter()  # requests by kind, refused ones too
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=MotoRequestHandler
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/_asked":
            with self._lock:
                text, self.asked = json.dumps(self.asked).encode(), Counter()
            start("200 OK", [("Content-Type", "application/json")])
            return [text]
        with self._lock:
            self.asked[kind(environ)] += 1
            refused = self.refuses(kind(environ), self.asked[kind(environ)])
        if self.latency_s:
            time.sleep(self.latency_s)
        reply = self.replies.get(kind(environ))
        if not refused and reply is None:
            return self._moto(environ, start)
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start("503 Slow Down" if refused else "200 OK", [("Content-Type", "application/xml")])
        return [SLOW_DOWN if refused else reply or b""]

    def calm(self) -> None:
        """No faults any more, and nothing asked yet."""
        self.latency_s, self.refuses, self.replies = 0.0, lambda kind, number: False, {}
        self.asked.clear()

    def serve(self) -> None:
        """Until it is stopped."""
        self._server.serve_forever()

    def __enter__(self) -> "SlowS3":
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


def environment(url: str) -> dict[str, str]:
    """Through which a client finds the server, as a user's clients find theirs."""
    return {**KEYS, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}


def client(url: str) -> Any:
    """boto3's."""
    keys = {"aws_access_key_id": "fake", "aws_secret_access_key": "fake"}
    return boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before every answer")
    server = SlowS3(parser.parse_args().latency)
    print(server.url, flush=True)
    server.serve()
