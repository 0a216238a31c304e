# SPDX-License-Identifier: Apache-2.0
"""The HTTP server: routes and middleware as Starlette has them, HTTP/1.1 as far as it is needed."""

import asyncio
import importlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .engine import Engine

# ASGI 3.0; and what an endpoint gets (the query, the body) and returns (the status, JSON or pieces).
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Query = dict[str, list[str]]
Reply = tuple[int, dict[str, Any] | list[bytes]]
Endpoint = Callable[[Query, Any], Awaitable[Reply]]

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 500: "Internal Server Error"}


class Route:
    def __init__(self, method: str, path: str, endpoint: Endpoint) -> None:
        self.method = method
        self.path_regex = re.compile(f"^{path}$")
        self.endpoint = endpoint


class Api:
    """The ASGI application."""

    def __init__(self, engine: Engine, args: Namespace) -> None:
        self.engine = engine
        self.args = args
        self.name = (args.served_model_name or [args.model])[0]
        self.routes = [
            Route("GET", "/health", self.health),
            Route("GET", "/v1/models", self.models),
            Route("POST", "/v1/completions", self.completions),
        ]
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            self.routes += [
                Route("POST", "/sleep", of("serve.dev.sleep.api_router", self.sleep)),
                Route("POST", "/wake_up", of("serve.dev.sleep.api_router", self.wake_up)),
                Route("GET", "/is_sleeping", of("serve.dev.sleep.api_router", self.is_sleeping)),
                Route("POST", "/collective_rpc", of("serve.dev.rpc.api_router", self.collective_rpc)),
                Route("GET", "/not_known_by_its_path", of("serve.dev.more.api_router", self.health)),
            ]
        self._stack: App = self._route
        for middleware in args.middleware:
            module, _, name = middleware.rpartition(".")
            self._stack = getattr(importlib.import_module(module), name)(self._stack)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        scope["app"] = self
        scope["root_path"] = self.args.root_path
        await self._stack(scope, receive, send)

    async def _route(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope["root_path"])
        keys = [key for key in self.args.api_key or [os.environ.get("VLLM_API_KEY")] if key]
        given = dict(scope["headers"]).get(b"authorization", b"").decode()
        status: int
        content: dict[str, Any] | list[bytes]
        status, content = 404, {"detail": "Not Found"}
        if keys and path.startswith("/v1") and given not in [f"Bearer {key}" for key in keys]:
            status, content = 401, {"error": "Unauthorized"}
        else:
            for route in self.routes:
                if route.path_regex.match(path) and route.method == scope["method"]:
                    query = parse_qs(scope["query_string"].decode())
                    body = (await receive())["body"]
                    try:
                        status, content = await route.endpoint(query, json.loads(body or b"null"))
                    except RuntimeError as error:
                        status, content = 500, {"error": str(error)}
                    break
        kind = b"text/event-stream" if isinstance(content, list) else b"application/json"
        pieces = content if isinstance(content, list) else [json.dumps(content).encode()]
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def health(self, query: Query, body: Any) -> Reply:
        return 200, {}

    async def models(self, query: Query, body: Any) -> Reply:
        return 200, {"data": [{"id": self.name, "max_model_len": self.args.max_model_len}]}

    async def completions(self, query: Query, body: Any) -> Reply:
        if body["model"] not in {self.name, ""}:
            return 404, {"error": f"The model `{body['model']}` does not exist."}
        found = await self.engine.ask("generate", prompt=body["prompt"], tokens=body.get("max_tokens", 16))
        by_number = body.get("return_tokens_as_token_ids")
        # As of some tokenizers, a token's text by itself is not what it is in the answer.
        tokens = [f"token_id:{number}" if by_number else f"▁{number}" for number, _ in found]
        texts = [text_of(number) for number, _ in found]
        if not body.get("stream"):
            return 200, {"choices": [{"text": "".join(texts)}]}
        events = []
        for token, text, (_, logprob) in zip(tokens, texts, found, strict=True):
            logprobs = {"tokens": [token], "token_logprobs": [logprob]}
            events.append({"choices": [{"text": text, "logprobs": logprobs if "logprobs" in body else None}]})
        lines = [json.dumps(event).encode() for event in events] + [b"[DONE]"]
        return 200, [b"data: " + line + b"\n\n" for line in lines]

    async def sleep(self, query: Query, body: Any) -> Reply:
        if not self.args.enable_sleep_mode:
            return 500, {"error": "Sleep mode is not enabled in the model config"}
        level = int(query.get("level", ["1"])[0])
        await self.engine.ask("sleep", level=level)
        return 200, {"status": "sleeping", "level": level}

    async def wake_up(self, query: Query, body: Any) -> Reply:
        awake = await self.engine.ask("wake_up", tags=query.get("tags"))
        return 200, {"status": "awake" if awake else "sleeping", "tags": query.get("tags")}

    async def is_sleeping(self, query: Query, body: Any) -> Reply:
        return 200, {"is_sleeping": await self.engine.ask("is_sleeping")}

    async def collective_rpc(self, query: Query, body: Any) -> Reply:
        if body["method"] != "reload_weights":
            return 400, {"error": "this one knows no other method"}
        return 200, {"results": [await self.engine.ask("reload_weights")]}


def of(module: str, endpoint: Endpoint) -> Endpoint:
    """An endpoint as if it stood in that module of vLLM."""

    async def found(query: Query, body: Any) -> Reply:
        return await endpoint(query, body)

    found.__module__ = f"vllm.entrypoints.{module}"
    return found


def text_of(number: int) -> str:
    return f" {number}"


async def listen(app: App, host: str, port: int) -> None:
    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await answer(app, reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(connected, host, port)
    print("Application startup complete.", flush=True)
    await server.serve_forever()


async def answer(app: App, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
    """Answers one request; False at the end of the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin1").strip().split("\r\n")
    method, target, _ = first.split(" ")
    pairs = [line.split(":", 1) for line in lines]
    headers = [(name.lower().encode(), value.strip().encode("latin1")) for name, value in pairs]
    body = await reader.readexactly(int(dict(headers).get(b"content-length", 0)))
    url = urlsplit(target)

    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            status = message["status"]
            kept = [(n, v) for n, v in message["headers"] if n != b"content-length"]
            lines = [b"HTTP/1.1 %d %s" % (status, REASONS[status].encode()), b"transfer-encoding: chunked"]
            writer.write(b"\r\n".join([*lines, *(n + b": " + v for n, v in kept), b"", b""]))
            return
        if message["body"]:
            writer.write(b"%x\r\n%s\r\n" % (len(message["body"]), message["body"]))
        if not message.get("more_body"):
            writer.write(b"0\r\n\r\n")
        await writer.drain()

    scope = {
        "type": "http",
        "method": method,
        "path": unquote(url.path),
        "query_string": url.query.encode(),
        "headers": headers,
        "client": writer.get_extra_info("peername")[:2],
    }
    await app(scope, receive, send)
    return True
