# SPDX-License-Identifier: Apache-2.0
"""One application for every kind of Python server: `asgi`, `wsgi`, and `deployed` for Ray Serve."""

import json
import os
from collections.abc import Awaitable, Callable, Iterable
from typing import Any


def answer(path: str) -> bytes:
    return json.dumps({"answer": 42} if path == "/answer" else {"ok": True, "pid": os.getpid()}).encode()


async def asgi(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    while scope["type"] == "lifespan":
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer(scope["path"])})


def wsgi(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    return [answer(environ["PATH_INFO"])]


def deployed() -> Any:
    """Return an application of Ray Serve, with one replica."""
    from ray import serve  # type: ignore[import-not-found]

    class Answers:
        def __call__(self, request: Any) -> Any:
            return json.loads(answer(request.url.path))

    return serve.deployment(ray_actor_options={"num_cpus": 0.1})(Answers).bind()
