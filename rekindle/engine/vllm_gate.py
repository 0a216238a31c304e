# SPDX-License-Identifier: Apache-2.0
"""Runs inside vLLM's server, as ASGI middleware: keeps its development endpoints for rekindle alone.

vLLM can put its weights to sleep only in development mode, which also opens endpoints by which whoever
reaches the port can run any method of the workers. So a copy of this file is put into the server's cell, and
vLLM is told of it by `--middleware rekindle_gate.Gate`. A request to such an endpoint is answered as if there
were none, unless it comes from the address that rekindle alone uses, within the cell. What comes from outside
is carried into the cell from another one; and headers by which a proxy would say for whom it asks, and
uvicorn believes it, are none of rekindle's.

Imports the standard library only, and nothing of rekindle.
"""

CONTROL = "127.83.0.1"

# Where vLLM keeps them since 0.11; before, they stand in the file of the server itself, hence the paths.
_MODULES = (
    *(".entrypoints.serve.dev.", ".entrypoints.serve.rpc.", ".entrypoints.serve.sleep."),
    ".entrypoints.rl.",
)
_PATHS = frozenset(
    {
        *("/sleep", "/wake_up", "/is_sleeping", "/collective_rpc", "/server_info"),
        *("/reset_prefix_cache", "/reset_mm_cache", "/reset_encoder_cache", "/release_kv_cache_memory"),
        *("/pause", "/resume", "/is_paused", "/abort_requests", "/update_weights", "/get_world_size"),
        *("/init_weight_transfer_engine", "/scale_elastic_ep", "/is_scaling_elastic_ep"),
    }
)
_PROXIED = (b"x-forwarded-", b"forwarded", b"x-real-ip")


class Gate:
    """The middleware."""

    def __init__(self, app) -> None:  # type: ignore[no-untyped-def]
        self._app = app
        self._routes: list | None = None  # type: ignore[type-arg]

    async def __call__(self, scope, receive, send) -> None:  # type: ignore[no-untyped-def]
        if scope["type"] in {"http", "websocket"} and not self._lets_in(scope):
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            headers = [(b"content-type", b"application/json"), (b"content-length", b"22")]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"detail":"Not Found"}'})
            return
        await self._app(scope, receive, send)

    def _lets_in(self, scope) -> bool:  # type: ignore[no-untyped-def]
        if not self._is_closed(scope):
            return True
        host = (scope.get("client") or ("",))[0]
        return host in {CONTROL, f"::ffff:{CONTROL}"} and not any(
            name.lower().startswith(_PROXIED) for name, _ in scope["headers"]
        )

    def _is_closed(self, scope) -> bool:  # type: ignore[no-untyped-def]
        path = scope["path"]
        root = scope.get("root_path") or ""
        inner = path[len(root) :] if root and path.startswith(root) else path
        if {path.rstrip("/") or "/", inner.rstrip("/") or "/"} & _PATHS:
            return True
        if self._routes is None:
            self._routes = [route for route in _flat(scope.get("app")) if _is_for_development(route)]
        return any(route.path_regex.match(each) for route in self._routes for each in (path, inner))


def _flat(app) -> list:  # type: ignore
    """The routes of an application, those of what is mounted or included in it, too."""
    found, queue = [], list(getattr(app, "routes", ()))
    while queue:
        route = queue.pop()
        queue += getattr(route, "routes", None) or ()
        if hasattr(route, "path_regex"):
            found.append(route)
    return found


def _is_for_development(route) -> bool:  # type: ignore[no-untyped-def]
    module = getattr(getattr(route, "endpoint", None), "__module__", None) or ""
    return any(part in f"{module}." for part in _MODULES)
