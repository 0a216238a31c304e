# SPDX-License-Identifier: Apache-2.0
"""ASGI middleware inside vLLM's server that reserves its development endpoints for rekindle.

vLLM can sleep only in development mode, which also opens endpoints through which any client of the port can
run any method of the workers. A copy of this file is therefore put into the server's cell and loaded with
`--middleware rekindle_gate.Gate`. It answers requests to these endpoints with 404 unless they carry the key
in the file beside it, which only the cell's processes and root can read. rekindle writes a key only while it
puts the server to sleep or wakes it, so no snapshot contains one. The client's address proves nothing: with
the host's network, other processes of the host reach the server over loopback, too, and uvicorn trusts the
address in a proxy's headers.

Imports only the standard library, and nothing of rekindle.
"""

import hmac
from pathlib import Path

HEADER = "x-rekindle-key"
KEY_NAME = "key"
KEY_BYTES = 64

# The modules of the endpoints in vLLM 0.33 and before, and those that were proposed for its own checkpoints
# (vllm-project/vllm#37925). The first versions defined them in the server's own module, hence the list of
# paths.
_MODULES = (
    *(".entrypoints.serve.dev.", ".entrypoints.serve.rpc.", ".entrypoints.serve.sleep."),
    *(".entrypoints.serve.cache.", ".entrypoints.serve.rlhf.", ".entrypoints.rl."),
    *(".entrypoints.serve.instrumentator.server_info.", ".entrypoints.serve.pause."),
    *(".entrypoints.serve.checkpoint.", ".entrypoints.serve.snapshot."),
)
_PATHS = frozenset(
    {
        *("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/server_info"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/release_kv_cache_memory"),
        *("/pause", "/resume", "/is_paused", "/abort_requests", "/get_world_size"),
        *("/init_weight_transfer_engine", "/shutdown_weight_transfer_engine", "/weight_info"),
        *("/start_weight_update", "/start_draft_weight_update", "/update_weights", "/finish_weight_update"),
        *("/update_weight_version", "/weight_checker"),
        *("/suspend", "/is_suspended", "/device_unlock"),
        *("/checkpoint", "/checkpoint/prepare", "/checkpoint/restore"),
    }
)
# An application may be mounted below a prefix, so the ends of a path are matched: up to this many parts, more
# than any path of vLLM's has.
_DEPTH = 8


class Gate:
    """The middleware, which vLLM creates."""

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
        """Tell whether the path, or its end below some prefix, is a development endpoint."""
        if self._routes is None:
            self._routes = _development_routes(scope.get("app"))
        path = scope["path"].rstrip("/\n")  # the `$` of a route's pattern also matches before a line feed
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
    """Return the development routes of an application and of those mounted or included in it."""
    found, queue = [], list(getattr(app, "routes", ()))
    while queue:
        route = queue.pop()
        queue += getattr(route, "routes", None) or ()
        module = getattr(getattr(route, "endpoint", None), "__module__", None) or ""
        if hasattr(route, "path_regex") and any(part in f"{module}." for part in _MODULES):
            found.append(route)
    return found
