"""A stand-in for the Hub, on 127.0.0.1: it keeps repos and all their revisions in memory, and fails where told to.

    with FakeHub() as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_fake")
        hub.fail("put", 503, after=1)  # from now on no LFS file but the next one can be uploaded
        hub.fail("commit", done=True, times=1)  # the next commit is made, but the client never hears of it

It speaks what the client asks for to create, change, list, upload, download and load models, datasets and spaces. Not
Xet: the client must run with HF_HUB_DISABLE_XET=1, see `environment`. LFS files lie where the Hub's lie, on another
host (the same server by its other name, localhost), which must not see a token.
"""

import asyncio
import os
import socket
import threading
from dataclasses import dataclass
from functools import partial
from urllib.parse import unquote

import uvicorn
from starlette.applications import Starlette
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from support.fake_hub_answers import INITIAL, ROUTES, STORAGE, Answer, Refusal, Repo, refused

__all__ = ["INITIAL", "FakeHub"]
TOKEN, HOSTS = "hf_fake", ("127.0.0.1", "localhost")


class Part(Convertor[str]):
    """A part of an address, percent-encoded: a revision may be refs/pr/1."""

    def __init__(self, regex: str):
        self.regex = regex

    def convert(self, value: str) -> str:
        return unquote(value)


for part, regex in {"kind": "models|datasets|spaces", "repo": "[^/]+/[^/]+", "rev": "[^/]+", "rest": ".+"}.items():
    register_url_convertor(part, Part(regex))


@dataclass
class Dropped:
    """Closes the connection, after the first `size` bytes of an answer where there is one."""

    answer: Response | None = None
    size: int = 0
    status_code = None

    async def __call__(self, scope, receive, send):
        if self.answer is not None:
            start = {"status": self.answer.status_code, "headers": self.answer.raw_headers}
            await send({"type": "http.response.start"} | start)
            await send({"type": "http.response.body", "body": self.answer.body[: self.size], "more_body": True})
        scope["state"]["transport"].close()
        while (await receive())["type"] != "http.disconnect":  # else uvicorn would answer 500
            pass


class Connection(H11Protocol):
    def connection_made(self, transport):
        super().connection_made(transport)
        self.app_state = {"transport": transport}  # becomes the state of each request
        # Else the body of an answer, which is sent after its head, waits 40 ms for the client to acknowledge that.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


@dataclass
class Fault:
    route: str
    answer: Response | Dropped
    after: int
    times: int | None
    done: bool
    cut: int | None

    def due(self) -> bool:
        """Whether this request fails; it is counted."""
        if self.after or self.times == 0:
            self.after = max(0, self.after - 1)
            return False
        if self.times is not None:
            self.times -= 1
        return True


class FakeHub:
    """Attributes: endpoint; tokens: the roles ("write" or "read") of the tokens that are valid; seen: the names of all
    routes so far that were asked for; log: (method, path, status) of all requests so far, the status None where the
    connection was closed without an answer or amid it; blobs: the LFS files that were uploaded, by SHA-256; repos: by
    models/user/name, datasets/user/name or spaces/user/name; storage: the address of the LFS files' host."""

    def __init__(self):
        self.repos, self.blobs, self.tokens = {}, {}, {TOKEN: "write"}
        self.seen, self.log, self.faults = [], [], []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint, self.storage = (f"http://{host}:{self.socket.getsockname()[1]}" for host in HOSTS)
        self.loop, self.stop = asyncio.new_event_loop(), asyncio.Event()
        self.thread = threading.Thread(target=lambda: self.loop.run_until_complete(self.serve()), daemon=True)

    def __enter__(self) -> "FakeHub":
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.stop.set)
        self.thread.join()
        self.loop.close()

    def repo(self, repo: str) -> Repo:
        """By user/name of a model, datasets/user/name, or spaces/user/name."""
        return self.repos[repo if repo.count("/") == 2 else f"models/{repo}"]

    def sha(self, repo: str, revision: str = "main") -> str:
        return self.repo(repo).sha(revision)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a revision, by name."""
        return dict(self.repo(repo).commits[self.sha(repo, revision)])

    def environment(self, home) -> dict[str, str]:
        """For a process that takes this for the Hub; `home` holds its cache and token."""
        changes = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "NO_PROXY": ",".join(HOSTS)}
        return os.environ | changes | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": f"{home}/hub"}

    def fail(self, route, status=None, *, code="", text="", headers=None, after=0, times=None, done=False, cut=None):
        """From now on requests on a route (a name of ROUTES) fail, until `heal`.

        status: of the answer, with `headers`, and `code` and `text` for the client. None: the connection is closed.
        after, times: so many requests pass before, and so many fail (None: all) before the others pass.
        done: the request is carried out, and only its answer is lost or replaced.
        cut: the connection is closed after so many bytes of the file, for "put" on its way here, for "cdn" from here.

        Of several faults on one route the first that is due counts. Raises ValueError where there is no such route, or
        no file to cut on it.
        """
        if route not in (ROUTES if cut is None else STORAGE):
            raise ValueError(f"route {route!r} must be one of {', '.join(ROUTES)}; for cut, {' or '.join(STORAGE)}")
        answer = Dropped() if status is None else refused(status, code, text, headers)
        self.faults.append(Fault(route, answer, after, times, done, cut))

    def heal(self) -> None:
        self.faults.clear()

    async def serve(self):
        """What uvicorn.Server does, which however looks only ten times a second whether it should stop."""
        routes = [
            Route(path, partial(self.answer, name), methods=[method], name=name)
            for name, (method, *paths) in ROUTES.items()
            for path in paths
        ]
        starlette = Starlette(routes=routes, exception_handlers={HTTPException: self.no_route})

        async def app(scope, receive, send):
            scope["path"] = scope["raw_path"].decode()  # encoded, so that %2F separates nothing
            await starlette(scope, receive, send)

        options = {"ws": "none", "lifespan": "off", "log_config": None, "log_level": "error", "timeout_keep_alive": 600}
        config, state = uvicorn.Config(app, http="h11", **options), ServerState()
        config.load()
        server = await self.loop.create_server(lambda: Connection(config, state, {}), sock=self.socket)
        await self.stop.wait()
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        if state.tasks:
            await asyncio.wait(state.tasks)

    async def no_route(self, request: Request, error: HTTPException) -> Response:
        asked = (request.method, request.scope["path"])
        self.log.append((*asked, error.status_code))
        return refused(error.status_code, "", f"no route for {' '.join(asked)}")

    async def answer(self, route: str, request: Request) -> Response | Dropped:
        self.seen.append(route)
        fault = next((fault for fault in self.faults if fault.route == route and fault.due()), None)
        try:
            answer = await self.perform(route, request, fault)
        except ClientDisconnect:
            answer = Dropped()
        self.log.append((request.method, request.scope["path"], answer.status_code))
        return answer

    async def perform(self, route: str, request: Request, fault: Fault | None) -> Response | Dropped:
        """Nothing is awaited once the request is read, so requests are carried out one after another."""
        if fault and fault.cut is not None and route == "put":
            left = fault.cut
            while left > 0 and (message := await request.receive()).get("more_body"):
                left -= len(message["body"])
            return Dropped()
        body = await request.body()
        if fault and fault.cut is None and not fault.done:
            return fault.answer
        made = self.carry_out(route, request, body)
        if fault is None:
            return made
        return fault.answer if fault.cut is None else Dropped(made, fault.cut)

    def carry_out(self, route: str, request: Request, body: bytes) -> Response:
        try:
            answer = getattr(Answer(self, route, request, body), route)()
        except Refusal as refusal:
            return refused(*refusal.args)
        return answer if isinstance(answer, Response) else JSONResponse(answer)
