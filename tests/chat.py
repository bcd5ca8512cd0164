"""Servers of the chat interface on this machine, over real HTTP."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, bytes]]


class Chat:
    """What a server was asked, and what it answers: (request, how many came before) → answer."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.lock = answer, threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.busy = self.most_busy = 0
        self.url = ""

    @property
    def clusters(self) -> list[str]:
        """The best candidate of each request, which tells its cluster."""
        return [prompt(asked)["candidates"][0] for asked in self.asked]


def prompt(asked: dict[str, Any]) -> dict[str, Any]:
    """The candidates and alt texts in a request."""
    return json.loads(asked["messages"][0]["content"][0]["text"].partition("\n\n")[2])


def saying(content: Any) -> bytes:
    """An answer with that content."""
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@contextmanager
def serving(answer: Answer, slow_s: float = 0.0) -> Iterator[Chat]:
    """A server for the length of the block."""
    chat = Chat(answer)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with chat.lock:
                before = len(chat.asked)
                chat.asked.append(asked)
                chat.headers.append(dict(self.headers))
                chat.paths.append(self.path)
                chat.busy += 1
                chat.most_busy = max(chat.most_busy, chat.busy)
            time.sleep(slow_s)
            status, body = chat.answer(asked, before)
            with chat.lock:
                chat.busy -= 1
            self.send_response(status)
            if status in (301, 302, 307):
                self.send_header("Location", body.decode())
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        chat.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield chat
        finally:
            server.shutdown()
