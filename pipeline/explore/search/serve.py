"""Command serve: web pages to search and browse a finished run, on the user's own machine.

reads   what `search` reads; clusters/exemplars.parquet; images in the input shards, by byte range

The pages have no scripts and no cookies; nothing is written. No part of a request is used as a
path. aiohttp serves them; Ray installs it.
"""

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiohttp import web

from pipeline.artifacts import layout
from pipeline.artifacts.layout import Space
from pipeline.explore.search import pages
from pipeline.explore.search.search import Search
from pipeline.runtime.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")
TOP = 24  # samples on a page
CLUSTERS = 48  # on a page
FORBIDDEN = web.HTTPForbidden.status_code
UPLOAD_BYTES = 10 << 20
UPLOAD_PIXELS = 64_000_000  # or the run's limit, if that is lower
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Server": "ratecluster",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Site:
    """The pages of one run, which one thread renders one after another.

    torch starts a pool of threads for every thread that calls it, and images take memory.
    """

    def __init__(self, search: Search, hosts: set[str] | None) -> None:
        self.search, self.hosts = search, hosts  # None allows every name
        self.thread = ThreadPoolExecutor(1)
        self.root, self.sizes = search.paths.root, search.sizes
        self.spaces = [space.value for space in search.indices]

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=UPLOAD_BYTES, middlewares=[self._guarded()])
        app.router.add_get("/", self.home, allow_head=False)
        app.router.add_get("/text", self.by_text, allow_head=False)
        app.router.add_post("/image", self.by_image)
        app.router.add_get(r"/cluster/{number:\d{1,9}}", self.cluster, allow_head=False)
        return app

    def _guarded(self) -> Any:
        @web.middleware
        async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
            """Refuse requests from other sites; show errors as pages without details."""
            try:
                self._refuse_others(request)
                response = await handler(request)
            except web.HTTPException as error:
                response = self._page(error.reason, error.status, known=error.status != FORBIDDEN)
            except UserError as error:
                response = self._page("The request failed", 400, alert=str(error))
            except Exception:
                log.exception("serve: %s %r failed", request.method, request.path)
                response = self._page("The server failed", 500, alert="see the terminal")
            response.headers.update(HEADERS)
            return response

        return guarded

    def _refuse_others(self, request: web.Request) -> None:
        """Refuse other host names (DNS rebinding) and forms on other sites."""
        if self.hosts is not None and _hostname(request.host) not in self.hosts:
            raise web.HTTPForbidden(reason="Unknown host name")
        site = request.headers.get("Sec-Fetch-Site", "none")
        if request.method == "POST" and site not in ("same-origin", "none"):
            raise web.HTTPForbidden(reason="Forms of other sites are refused")

    async def home(self, request: web.Request) -> web.Response:
        """All clusters, largest first, each with a typical member."""
        last = max(1, -(-len(self.sizes) // CLUSTERS))
        number = page_number(request.query.get("page", ""), last)
        order = sorted(range(len(self.sizes)), key=lambda cluster: -self.sizes[cluster])
        shown = order[(number - 1) * CLUSTERS : number * CLUSTERS]
        hits = await self._work(self.search.most_typical, shown)
        title = f"{self.search.rows.total:,} images in {len(self.sizes):,} clusters"
        return await self._gallery(title, "clusters", hits, number=number, last=last)

    async def by_text(self, request: web.Request) -> web.Response:
        """The samples most similar to a text."""
        words = request.query.get("q", "")
        query = await self._work(self.search.of_text, words)
        hits = await self._work(self.search.nearest, query, Space.CLIP, TOP)
        return await self._gallery(f"Most similar to “{words}”", "hits", hits, query=words)

    async def by_image(self, request: web.Request) -> web.Response:
        """The samples most similar to an uploaded image."""
        try:
            form = await request.post()
        except ValueError:
            raise UserError("the upload cannot be read; try again") from None
        file, name = form.get("file"), form.get("space", Space.CLIP.value)
        if not isinstance(file, web.FileField):
            raise UserError("no image was sent; choose a file")
        if name not in self.spaces:
            raise UserError(f"unknown space {name!r}")
        space, limit = Space(name), min(UPLOAD_PIXELS, self.search.max_pixels)
        data = await self._work(file.file.read)
        query = await self._work(self.search.of_image, data, space, limit)
        hits = await self._work(self.search.nearest, query, space, TOP)
        return await self._gallery("Most similar to your image", "hits", hits)

    async def cluster(self, request: web.Request) -> web.Response:
        """The typical members of a cluster."""
        number = int(request.match_info["number"])
        hits = await self._work(self.search.typical, number)
        note = f"Cluster {number} · {self.sizes[number]:,} samples; the most typical members:"
        title = self.search.captions[number] or "(no caption)"
        return await self._gallery(title, "hits", hits, note=note)

    async def _gallery(self, title: str, name: str, hits: Any, **facts: Any) -> web.Response:
        shown: Any = await self._work(pages.with_thumbnails, hits, self.search.max_pixels)
        return self._page(title, **{name: shown}, **facts)

    def _page(
        self, title: str, status: int = 200, known: bool = True, **facts: Any
    ) -> web.Response:
        """A page; without `known` it does not name the run."""
        html = pages.page(title, site=self if known else None, **facts)
        return web.Response(text=html, status=status, content_type="text/html", charset="utf-8")

    async def _work(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.thread, function, *arguments)


def page_number(text: str, last: int) -> int:
    """The number of a page, limited to 1 and `last`; 1 if the text is no number."""
    return min(last, max(1, int(text))) if text.isdecimal() and len(text) < 10 else 1


def loopback_names(host: str) -> set[str] | None:
    """Host names that requests to a server on a loopback address may use; else None."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return {"localhost", "127.0.0.1", "::1", host} if loopback else None


def _hostname(netloc: str) -> str | None:
    try:
        return urlsplit(f"//{netloc}").hostname
    except ValueError:
        return None


def run(paths: layout.RunPaths, host: str, port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted; `say` prints the address when the server is ready."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error.strerror}; give another --host or --port"
        ) from None
    with listening:
        spaces = [Space.CLIP, *([Space.Z] if paths.index(Space.Z.value).peek() else [])]
        search, hosts = Search(paths, spaces), loopback_names(host)
        if search.made["embeddings"]["config"]["model"]:
            assert search.encoder  # loads it before the first request
        if hosts is None:
            log.warning("serve: anyone who reaches %s sees the images; there is no password", host)
        shown = f"[{host}]" if ":" in host else host
        say(f"http://{shown}:{listening.getsockname()[1]}/")
        application = Site(search, hosts).application()
        web.run_app(application, sock=listening, print=None, access_log=None)
