# SPDX-License-Identifier: Apache-2.0
"""The gate before vLLM's development endpoints: who is let in, and where it stands."""

import ast
import asyncio
import importlib.util
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from rekindle.engine import vllm_gate

KEY = "0123456789abcdef" * 4
OURS = [(b"x-rekindle-key", KEY.encode())]
DEVELOPMENT = "vllm.entrypoints.serve.dev.sleep.api_router"
PUBLIC = "vllm.entrypoints.openai.completion.api_router"


class Server:
    """An application behind the gate, which is a copy of a file, as in a cell. It says 200 to everything."""

    def __init__(self, place: Path, routes: Sequence[object] = (), *, key: str | None = KEY) -> None:
        self.place = place
        copy = place / "rekindle_gate.py"
        copy.write_bytes(Path(vllm_gate.__file__).read_bytes())
        if key is not None:
            (place / "key").write_text(key)
        self.app = SimpleNamespace(routes=list(routes))
        self.gate = load(copy).Gate(self._answer)
        self.seen: list[dict[str, Any]] = []

    async def _answer(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.seen.append(scope)
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"served"})
        elif scope["type"] == "websocket":
            await send({"type": "websocket.accept"})

    def send(self, scope: dict[str, Any]) -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        asyncio.run(self.gate(scope, receive, send))
        return sent

    def ask(self, path: str, headers: Sequence[tuple[bytes, bytes]] = (), **scope: Any) -> int:
        """The status that a request gets."""
        defaults = {"type": "http", "method": "POST", "client": ("127.0.0.1", 40000), "app": self.app}
        sent = self.send({**defaults, "path": path, "headers": list(headers), **scope})
        assert [message["type"] for message in sent] == ["http.response.start", "http.response.body"]
        return int(sent[0]["status"])


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("rekindle_gate", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def route(path: str, module: str) -> SimpleNamespace:
    """As Starlette's."""

    def endpoint() -> None: ...

    endpoint.__module__ = module
    return SimpleNamespace(path_regex=re.compile(f"^{path}$"), endpoint=endpoint)


def mount(path: str, *routes: object) -> SimpleNamespace:
    return SimpleNamespace(path_regex=re.compile(f"^{path}/(?P<path>.*)$"), routes=list(routes))


PATHS = sorted(load(Path(vllm_gate.__file__))._PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_a_development_endpoint_is_open_to_who_has_the_key_and_to_nobody_else(
    path: str, tmp_path: Path
) -> None:
    server = Server(tmp_path)
    assert server.ask(path) == 404
    assert not server.seen
    assert server.ask(path, OURS) == 200


def test_what_must_not_be_missing_is_among_the_paths() -> None:
    assert {"/sleep", "/wake_up", "/collective_rpc", "/server_info", "/reset_prefix_cache"} <= set(PATHS)
    assert {"/suspend", "/checkpoint", "/checkpoint/prepare", "/checkpoint/restore"} <= set(PATHS), "proposed"


def test_the_answer_is_that_of_a_path_that_there_is_none(tmp_path: Path) -> None:
    scope = {"type": "http", "path": "/sleep", "headers": [], "client": ("1.2.3.4", 5)}
    start, body = Server(tmp_path).send(scope)
    assert start["status"] == 404
    assert json.loads(body["body"]) == {"detail": "Not Found"}
    assert dict(start["headers"]) == {
        b"content-type": b"application/json",
        b"content-length": str(len(body["body"])).encode(),
    }


@pytest.mark.parametrize(
    "path",
    [
        *("/", "", "/health", "/v1/models", "/v1/completions", "/metrics", "/v1/chat/completions"),
        *("/sleepy", "/asleep", "/v1/sleep_over", "/sleep/more", "/scale_elastic_ep"),
    ],
)
def test_other_paths_are_open_to_all(path: str, tmp_path: Path) -> None:
    server = Server(tmp_path, [route("/v1/completions", PUBLIC)], key=None)
    assert server.ask(path) == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/sleep/", "/sleep//", "/sleep\n", "/api/sleep", "//sleep", "/a/b/c/collective_rpc"),
        *("/a/b/c/d/e/f/g/h/i/j/k/wake_up/",),
    ],
)
def test_a_path_that_a_router_might_take_for_one_of_them_is_closed(path: str, tmp_path: Path) -> None:
    assert Server(tmp_path).ask(path) == 404


@pytest.mark.parametrize("root", ["/api", "/api/", "/sleep"])
def test_a_root_path_hides_nothing(root: str, tmp_path: Path) -> None:
    server = Server(tmp_path, [route("/brand_new", DEVELOPMENT)])
    for path in ("/sleep", "/brand_new"):
        assert server.ask(f"{root.rstrip('/')}{path}", root_path=root) == 404
        assert server.ask(f"{root.rstrip('/')}{path}", OURS, root_path=root) == 200
        assert server.ask(path, root_path=root) == 404


@pytest.mark.parametrize(
    "module",
    [
        *(DEVELOPMENT, "vllm.entrypoints.serve.rpc.api_router", "vllm.entrypoints.serve.sleep.api_router"),
        *("vllm.entrypoints.serve.cache.api_router", "vllm.entrypoints.serve.rlhf.api_router"),
        *("vllm.entrypoints.rl.online.api_router", "vllm.entrypoints.serve.dev"),
        "vllm.entrypoints.serve.instrumentator.server_info",
        *("vllm.entrypoints.serve.checkpoint.api_router", "vllm.entrypoints.serve.snapshot.api_router"),
        *("vllm.entrypoints.serve.pause.api_router", "vllm.frontend.entrypoints.serve.dev.sleep.api_router"),
    ],
)
def test_an_endpoint_that_nobody_knew_of_is_closed_by_its_module(module: str, tmp_path: Path) -> None:
    server = Server(tmp_path, [route("/brand_new", module), route("/brand_new_too", PUBLIC)])
    assert server.ask("/brand_new") == 404
    assert server.ask("/brand_new", OURS) == 200
    assert server.ask("/brand_new_too") == 200


def test_an_endpoint_with_a_part_that_varies_is_closed(tmp_path: Path) -> None:
    server = Server(tmp_path, [route("/weights/(?P<name>[^/]+)", DEVELOPMENT)])
    assert server.ask("/weights/some") == 404
    assert server.ask("/weights/some/more") == 200


def test_what_is_mounted_or_included_is_closed_too(tmp_path: Path) -> None:
    included = SimpleNamespace(routes=[route("/included", DEVELOPMENT)])
    deep = mount("/deep", mount("/deeper", route("/new", DEVELOPMENT), route("/old", PUBLIC)))
    server = Server(tmp_path, [included, mount("/metrics"), deep])
    assert server.ask("/included") == 404
    assert server.ask("/deep/deeper/new") == 404
    assert server.ask("/deep/deeper/new", OURS) == 200
    assert server.ask("/deep/deeper/old") == 200
    assert server.ask("/metrics/") == 200


def test_an_application_without_routes_and_none_at_all_are_closed_by_path(tmp_path: Path) -> None:
    server = Server(tmp_path)
    for app in (None, object(), SimpleNamespace(routes=[SimpleNamespace(endpoint=None)])):
        server.gate._routes = None
        assert server.ask("/sleep", app=app) == 404
        assert server.ask("/health", app=app) == 200


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-forwarded-for", b"127.0.0.1")],
        [(b"x-forwarded-for", b"127.83.0.1"), (b"x-forwarded-proto", b"http")],
        [(b"forwarded", b"for=127.0.0.1")],
        [(b"x-real-ip", b"127.0.0.1")],
        [(b"host", b"localhost")],
        [(b"authorization", b"Bearer " + KEY.encode())],
        [(b"x-rekindle-key", b"")],
        [(b"x-rekindle-key", KEY[:-1].encode())],
        [(b"x-rekindle-key", (KEY + "0").encode())],
        [(b"x-rekindle-key", KEY.upper().encode())],
        [(b"x-rekindle-key", b"\xff" * 64)],
        [(b"x-rekindle-key", KEY.encode()), (b"x-rekindle-key", b"other")],
        [(b"x-rekindle-key", b"other"), (b"x-rekindle-key", KEY.encode())],
    ],
)
def test_no_other_header_opens_it(headers: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    assert Server(tmp_path).ask("/sleep", headers) == 404


@pytest.mark.parametrize(
    "client", [("127.0.0.1", 1), ("::1", 1), ("::ffff:127.0.0.1", 1), ("10.0.0.1", 1), None, ("", 0)]
)
def test_no_address_opens_it_and_none_closes_it(client: tuple[str, int] | None, tmp_path: Path) -> None:
    server = Server(tmp_path)
    assert server.ask("/sleep", client=client) == 404
    assert server.ask("/sleep", OURS, client=client) == 200


@pytest.mark.parametrize("key", [None, "", "short", KEY[:-1], KEY + "0", KEY * 1000])
def test_without_a_right_key_beside_it_it_is_closed_to_all(key: str | None, tmp_path: Path) -> None:
    server = Server(tmp_path, key=key)
    for given in (key or "", KEY, KEY[:-1]):
        assert server.ask("/sleep", [(b"x-rekindle-key", given.encode())]) == 404


def test_a_key_holds_as_long_as_it_lies_there(tmp_path: Path) -> None:
    server = Server(tmp_path)
    assert server.ask("/sleep", OURS) == 200
    (tmp_path / "key").write_text("f" * 64)
    assert server.ask("/sleep", OURS) == 404
    assert server.ask("/sleep", [(b"X-Rekindle-Key", b"f" * 64)]) == 200
    (tmp_path / "key").unlink()
    assert server.ask("/sleep", OURS) == 404


def test_a_websocket_is_closed_before_it_is_accepted(tmp_path: Path) -> None:
    server = Server(tmp_path, [route("/live", DEVELOPMENT)])
    scope = {"type": "websocket", "path": "/live", "headers": [], "app": server.app}
    assert server.send(scope) == [{"type": "websocket.close", "code": 1008}]
    assert not server.seen
    assert server.send({**scope, "path": "/v1/realtime"}) == [{"type": "websocket.accept"}]
    assert server.send({**scope, "headers": OURS}) == [{"type": "websocket.accept"}]


def test_a_lifespan_passes(tmp_path: Path) -> None:
    server = Server(tmp_path, key=None)
    assert server.send({"type": "lifespan"}) == []
    assert server.seen == [{"type": "lifespan"}]


def test_the_request_reaches_the_application_as_it_came(tmp_path: Path) -> None:
    server = Server(tmp_path)
    scope = {"type": "http", "path": "/sleep/", "headers": OURS, "root_path": "/x", "client": None}
    server.send(scope)
    assert server.seen == [scope]
    assert server.seen[0] is scope


def test_a_long_path_costs_little(tmp_path: Path) -> None:
    server = Server(tmp_path, [route(f"/new{number}", DEVELOPMENT) for number in range(50)])
    began = time.perf_counter()
    assert server.ask("/a" * 30_000) == 200
    assert time.perf_counter() - began < 0.5


def test_it_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(vllm_gate.__file__).read_text())
    froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    assert {*froms, *names} == {"hmac", "pathlib"}
