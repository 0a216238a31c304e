# SPDX-License-Identifier: Apache-2.0
"""Runs inside vLLM's server, as ASGI middleware: keeps its development endpoints for rekindle alone.

vLLM can put its weights to sleep only in development mode, which also opens endpoints by which whoever
reaches the port can run any method of the workers. So a copy of this file is put into the server's cell, and
vLLM is told of it by `--middleware rekindle_gate.Gate`. A request to such an endpoint is answered as if there
were none, unless it brings the key that lies beside this file, where only the cell's processes and root see
it. rekindle puts one there while it sends the server to sleep or wakes it, and no longer: no snapshot holds
one. From which address somebody asks is of no account: with the host's network, others on the host reach the
server on its loopback, too; and uvicorn believes those who say for whom they ask.

Imports the standard library only, and nothing of rekindle.
"""

import hmac
from pathlib import Path

HEADER = "x-rekindle-key"
KEY_NAME = "key"
KEY_BYTES = 64

# Where vLLM 0.32 keeps them, and where they were before. At first they stood in the file of the server
# itself, hence the paths.
_MODULES = (
    *(".entrypoints.serve.dev.", ".entrypoints.serve.rpc.", ".entrypoints.serve.sleep."),
    *(".entrypoints.serve.cache.", ".entrypoints.serve.rlhf.", ".entrypoints.rl."),
    ".entrypoints.serve.instrumentator.server_info.",
)
_PATHS = frozenset(
    {
        *("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/server_info"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/release_kv_cache_memory"),
        *("/pause", "/resume", "/is_paused", "/abort_requests", "/get_world_size"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/weight_info"),
        *("/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update"),
        *("/update_weight_version", "/weight_checker"),
    }
)
# Below what an application may be mounted or included at, of a path as deep as none of vLLM's.
_DEPTH = 8


class Gate:
    """The middleware."""

    def __init__(self, app) -> None:  # type: ignore[no-untyped-def]
        self._app = app
        self._routes: list | None = None  # type: ignore[type-arg]

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["type"] in {"http", "websocket"} and self._is_closed(scope) and not _has_key(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            headers = [(b"content-type", b"application/json"), (b"content-length", b"22")]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"detail":"Not Found"}'})
            return
        await self._app(scope, receive, send)

    def _is_closed(self, scope) -> bool:  # type: ignore[no-untyped-def]
        """Whether the path, or its end below some prefix, is that of a development endpoint."""
        if self._routes is None:
            self._routes = _development_routes(scope.get("app"))
        path = scope["path"].rstrip("/\n")  # the end of a route's pattern lets a line feed pass
        parts = path.split("/")[-_DEPTH:]
        ends = [path, *("/" + "/".join(parts[first:]) for first in range(len(parts)))]
        return any(end in _PATHS or any(r.path_regex.match(end) for r in self._routes) for end in ends)


def _has_key(scope) -> bool:  # type: ignore[no-untyped-def]
    given = [value for name, value in scope["headers"] if name.lower() == HEADER.encode()]
    try:
        with open(Path(__file__).with_name(KEY_NAME), "rb") as file:
            key = file.read(KEY_BYTES + 1)
    except OSError:
        return False
    return len(key) == KEY_BYTES and len(given) == 1 and hmac.compare_digest(given[0], key)


def _development_routes(app: object) -> list:  # type: ignore[type-arg]
    """Those of an application, and of what is mounted or included in it."""
    found, queue = [], list(getattr(app, "routes", ()))
    while queue:
        route = queue.pop()
        queue += getattr(route, "routes", None) or ()
        module = getattr(getattr(route, "endpoint", None), "__module__", None) or ""
        if hasattr(route, "path_regex") and any(part in f"{module}." for part in _MODULES):
            found.append(route)
    return found
