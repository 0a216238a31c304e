# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of vLLM without its engine: uvicorn as vLLM starts it, and vLLM's own authentication.

Run it with the Python of an environment that has vLLM: `guarded.py PORT ROOT_PATH [KEY…]`. Without a key it
is the server inside a cell; with keys it is what a start of today would be.
"""

import importlib.util
import sys
from collections.abc import AsyncIterator
from importlib.metadata import distribution
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.middleware.cors import CORSMiddleware

_MODULE = "vllm/entrypoints/serve/middleware/authenticate.py"


def authentication() -> type:
    """vLLM's middleware; importing all of vLLM would take seconds."""
    place = Path(str(distribution("fastapi").locate_file(_MODULE)))
    spec = importlib.util.spec_from_file_location("authenticate", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.AuthenticationMiddleware
    assert isinstance(found, type)
    return found


def make(root_path: str, keys: list[str]) -> FastAPI:
    app = FastAPI()
    app.root_path = root_path

    @app.api_route("/health", methods=["GET", "POST", "HEAD"])
    async def health() -> PlainTextResponse:
        return PlainTextResponse("")

    @app.get("/v1/models")
    async def models() -> dict[str, str]:
        return {"object": "list"}

    @app.post("/v1/echo")
    @app.post("/invocations")
    async def echo(request: Request) -> dict[str, object]:
        content = await request.body()
        return {"bytes": len(content), "method": request.method}

    @app.post("/v1/early")
    async def early() -> PlainTextResponse:
        return PlainTextResponse("without the body", status_code=413)

    @app.get("/v1/stream")
    async def stream(pieces: int, size: int) -> StreamingResponse:
        async def made() -> AsyncIterator[bytes]:
            for _ in range(pieces):
                yield b"x" * size

        return StreamingResponse(made(), media_type="text/event-stream")

    @app.get("/v2/x")
    @app.get("/inference/x")
    @app.get("/cohere/x")
    @app.get("/tokenize")
    async def something() -> dict[str, str]:
        return {}

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_text(await websocket.receive_text())

    app.add_middleware(CORSMiddleware, allow_origins=[], allow_methods=["*"], allow_headers=["*"])
    if keys:
        app.add_middleware(authentication(), tokens=keys)
    return app


if __name__ == "__main__":
    uvicorn.run(make(sys.argv[2], sys.argv[3:]), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
