# SPDX-License-Identifier: Apache-2.0
"""Requests, odd and plain, with a key and without, to compare who refuses what: bytes by their names."""

import re
import socket

KEY = "Kq7-heron-52-Moth"
_KEY = f"Authorization: Bearer {KEY}\r\n".encode()
_HOST = b"Host: x\r\n"
_WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
_H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
_CHUNKED = b"Transfer-Encoding: chunked\r\n"
_FIVE = b"Content-Length: 5\r\n"


def _request(line: str, *headers: bytes, body: bytes = b"") -> bytes:
    return line.encode("latin-1") + b" HTTP/1.1\r\n" + b"".join(headers) + b"\r\n" + body


_FIRST_SECONDS = 20.0
_PLAIN = _request("GET /v1/models", _HOST)
_ALLOWED = _request("GET /v1/models", _HOST, _KEY)
_HEALTH = _request("GET /health", _HOST)

_TARGETS = [
    *("/v1/models", "//v1/models", "/v1/../v1/models", "/./v1/models", "/%76%31/models", "/v1%2fmodels"),
    *("%2fv1/models", "http://x/v1/models", "http://x//v1/models", "https://x/v1/models"),
    *("HTTP://x/v1/models", "http://x:99999/v1/models", "http://x", "ws://x/v1/models"),
    *("http://u@x/v1/models", "http:///v1/models", "http:/v1/models", "x:y/v1/models", "/V1/models"),
    *("/v1", "/v1x", "/v2/x", "/inference/x", "/cohere/x", "/tokenize", "/health", "/health?a=/v1/models"),
    *("/health#/v1/models", "/v1/models#x", "/v1/models?x=y", "*", "/\\v1/models", "/;/v1/models"),
    *("/%2e%2e/v1/models", "/%00/v1/models", "/v1/mod\xc3\xa9ls", "/v1/models\x01", "/%ff/v1"),
    *("?/v1/models", "v1/models", "/%252fv1", "/root/v1/models", "/root/root/v1/models", "//x/v1/models"),
    *("/v1/models?\xe9", "/rootv1/models"),
]
_METHODS = [
    *("get", "options", "Options", "OPTIONS", "HEAD", "POST", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT"),
    *("FOO", "M-SEARCH", "PURGE", "QUERY", "PRI", "SOURCE", "LOCK"),
]
_AUTHORIZATIONS = {
    "lower case": f"authorization: bearer {KEY}\r\n",
    "upper case": f"AUTHORIZATION: BEARER {KEY}\r\n",
    "two spaces": f"Authorization: Bearer  {KEY}\r\n",
    "a space after it": f"Authorization: Bearer {KEY} \r\n",
    "a tab after it": f"Authorization: Bearer {KEY}\t\r\n",
    "spaces before it": f"Authorization:   Bearer {KEY}\r\n",
    "a tab before it": f"Authorization:\tBearer {KEY}\r\n",
    "a tab within": f"Authorization: Bearer\t{KEY}\r\n",
    "another": "Authorization: Bearer other\r\n",
    "no key": "Authorization: Bearer\r\n",
    "empty": "Authorization:\r\n",
    "basic": f"Authorization: Basic {KEY}\r\n",
    "no scheme": f"Authorization: {KEY}\r\n",
    "its beginning": f"Authorization: Bearer {KEY[:-1]}\r\n",
    "more than it": f"Authorization: Bearer {KEY}1\r\n",
    "right, then wrong": f"Authorization: Bearer {KEY}\r\nAuthorization: Bearer no\r\n",
    "wrong, then right": f"Authorization: Bearer no\r\nAuthorization: Bearer {KEY}\r\n",
    "a space before the colon": f"Authorization : Bearer {KEY}\r\n",
    "folded": f"Authorization: Bearer\r\n {KEY}\r\n",
    "in a folded line": f"X: a\r\n Authorization: Bearer {KEY}\r\n",
    "an underscore": f"X_Authorization: Bearer {KEY}\r\n",
    "a bare line feed": f"Authorization: Bearer {KEY}\n",
    "after a bare return": f"X: a\rAuthorization: Bearer {KEY}\r\n",
    "beside a zero": f"X: a\0b\r\nAuthorization: Bearer {KEY}\r\n",
    "beside a control character": f"X: a\x01b\r\nAuthorization: Bearer {KEY}\r\n",
    "beside latin-1": f"X: \xe9\r\nAuthorization: Bearer {KEY}\r\n",
    "beside no name": f": x\r\nAuthorization: Bearer {KEY}\r\n",
    "beside a bad name": f"X(y: z\r\nAuthorization: Bearer {KEY}\r\n",
    "beside no colon": f"XX\r\nAuthorization: Bearer {KEY}\r\n",
    "a list": f"Authorization: Bearer {KEY}, Bearer x\r\n",
    "another header": f"X-Api-Key: {KEY}\r\n",
    "named in Connection": f"Authorization: Bearer {KEY}\r\nConnection: Authorization\r\n",
}
_ENCODINGS = [
    *("xchunked", "chunked, identity", "identity", "identity, chunked", "gzip, chunked", "Chunked"),
    *("\x0bchunked", "chunked, chunked", " chunked", "chunked\t"),
]
_LENGTHS = ["5, 5", "+5", "-5", "5 ", "0x5", "05", "5,6", "", "9" * 23, " 5"]
_CHUNKS = [
    *("5;ext=1\r\nhello\r\n0\r\n\r\n", "5\r\nhelloXX0\r\n\r\n", "0x5\r\nhello\r\n0\r\n\r\n"),
    *("-5\r\nhello\r\n0\r\n\r\n", "00000005\r\nhello\r\n0\r\n\r\n", "5;a\nb\r\nhello\r\n0\r\n\r\n"),
]

REQUESTS: dict[str, bytes] = {
    **{f"target {each!r}": _request(f"GET {each}", _HOST) for each in _TARGETS},
    **{f"target {each!r}, key": _request(f"GET {each}", _HOST, _KEY) for each in _TARGETS},
    **{f"method {each}": _request(f"{each} /v1/models", _HOST) for each in _METHODS},
    **{f"method {each}, key": _request(f"{each} /v1/models", _HOST, _KEY) for each in _METHODS},
    **{f"method {each}, open": _request(f"{each} /health", _HOST) for each in _METHODS},
    "method CONNECT, authority": _request("CONNECT x:80", _HOST),
    **{
        f"authorization {name}": _request("GET /v1/models", _HOST, header.encode("latin-1"))
        for name, header in _AUTHORIZATIONS.items()
    },
    "bare line feeds": b"GET /v1/models HTTP/1.1\nHost: x\n\n",
    "bare line feeds, open": b"GET /health HTTP/1.1\nHost: x\n\n",
    "a bare line feed ends the head": _HEALTH[:-2] + b"\n" + _PLAIN,
    "1.0": b"GET /v1/models HTTP/1.0\r\n\r\n",
    "1.0, key": b"GET /v1/models HTTP/1.0\r\n" + _KEY + b"\r\n",
    "1.0, kept alive": b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    b"GET /v1/models HTTP/1.0\r\n\r\n",
    "0.9": b"GET /v1/models\r\n\r\n",
    "1.2": b"GET /v1/models HTTP/1.2\r\nHost: x\r\n\r\n",
    "2.0": b"GET /v1/models HTTP/2.0\r\nHost: x\r\n\r\n",
    "no host": _request("GET /v1/models"),
    "no host, key": _request("GET /v1/models", _KEY),
    "two hosts": _request("GET /v1/models", _HOST, _HOST),
    "two hosts, key": _request("GET /v1/models", _HOST, _HOST, _KEY),
    "a host with a path": _request("GET /v1/models", b"Host: x/health?\r\n"),
    "HTTP/2 at once": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
    "h2c": _request("GET /v1/models", _HOST, _H2C),
    "h2c, then more": _request("GET /health", _HOST, _H2C) + _PLAIN,
    "pipelined, second without": _ALLOWED + _PLAIN,
    "pipelined, first without": _PLAIN + _ALLOWED,
    "pipelined, middle without": _HEALTH + _PLAIN + _HEALTH,
    "refused with a body, then allowed": _request("POST /v1/echo", _HOST, _FIVE, body=b"hello") + _ALLOWED,
    "allowed with a body, then without": _request("POST /v1/echo", _HOST, _KEY, _FIVE, body=b"hello")
    + _PLAIN,
    "chunked": _request("POST /v1/echo", _HOST, _KEY, _CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n") + _PLAIN,
    "chunked without": _request("POST /v1/echo", _HOST, _CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n"),
    "a key in the trailer": _request(
        "POST /v1/echo", _HOST, _CHUNKED, b"Trailer: Authorization\r\n", body=b"0\r\n" + _KEY + b"\r\n"
    ),
    "after a chunked body": _request("POST /health", _HOST, _CHUNKED, body=b"0\r\n\r\n") + _PLAIN,
    "length, encoding": _request(
        "POST /health", _HOST, b"Content-Length: 4\r\n", _CHUNKED, body=b"0\r\n\r\n" + _PLAIN
    ),
    "encoding, length": _request(
        "POST /health", _HOST, _CHUNKED, b"Content-Length: 4\r\n", body=b"0\r\n\r\n" + _PLAIN
    ),
    "both, key": _request("POST /v1/echo", _HOST, _KEY, _FIVE, _CHUNKED, body=b"0\r\n\r\n"),
    **{
        f"encoding {each!r}": _request(
            "POST /health", _HOST, f"Transfer-Encoding: {each}\r\n".encode("latin-1"), body=b"0\r\n\r\n"
        )
        for each in _ENCODINGS
    },
    "two encodings": _request(
        "POST /health", _HOST, _CHUNKED, b"Transfer-Encoding: identity\r\n", body=b"0\r\n\r\n"
    ),
    "encoding, a space before the colon": _request(
        "POST /health", _HOST, b"Transfer-Encoding : chunked\r\n", body=b"0\r\n\r\n"
    ),
    **{
        f"length {each!r}": _request(
            "POST /invocations", _HOST, f"Content-Length: {each}\r\n".encode(), body=b"hello"
        )
        for each in _LENGTHS
    },
    "two equal lengths": _request("POST /invocations", _HOST, _FIVE, _FIVE, body=b"hello"),
    "two lengths": _request("POST /invocations", _HOST, _FIVE, b"Content-Length: 6\r\n", body=b"hello"),
    **{
        f"chunks {each!r}": _request("POST /invocations", _HOST, _CHUNKED, body=each.encode())
        for each in _CHUNKS
    },
    "a request as the body of GET": _request(
        "GET /health", _HOST, f"Content-Length: {len(_PLAIN)}\r\n".encode(), body=_PLAIN
    ),
    "expect": _request("POST /v1/echo", _HOST, _KEY, _FIVE, b"Expect: 100-continue\r\n", body=b"hello"),
    "expect without": _request("POST /v1/echo", _HOST, _FIVE, b"Expect: 100-continue\r\n"),
    "expect something else": _request("POST /v1/echo", _HOST, _KEY, _FIVE, b"Expect: x\r\n", body=b"hello"),
    "answered early": _request("POST /v1/early", _HOST, _KEY, _FIVE, body=b"hello") + _PLAIN,
    "websocket without": _request("GET /v1/realtime", _HOST, _WEBSOCKET),
    "websocket": _request("GET /v1/realtime", _HOST, _KEY, _WEBSOCKET),
    "websocket, OPTIONS": _request("OPTIONS /v1/realtime", _HOST, _WEBSOCKET),
    "websocket, POST": _request("POST /v1/realtime", _HOST, _WEBSOCKET),
    "websocket, escaped": _request("GET /%761/realtime", _HOST, _WEBSOCKET),
    "websocket, absolute": _request("GET http://x/v1/realtime", _HOST, _WEBSOCKET),
    "websocket elsewhere": _request("GET /v1/models", _HOST, _KEY, _WEBSOCKET),
    "websocket to open, then more": _request("GET /health", _HOST, _WEBSOCKET) + _PLAIN,
    "websocket, then HTTP": _request("GET /v1/realtime", _HOST, _KEY, _WEBSOCKET) + _PLAIN,
    "empty lines before": b"\r\n\r\n" + _PLAIN,
    "a line feed before": b"\n" + _PLAIN,
    "a space before": b" " + _PLAIN,
    "two spaces": b"GET  /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "tabs": b"GET\t/v1/models\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "a space after": b"GET /v1/models HTTP/1.1 \r\nHost: x\r\n\r\n",
    "two targets": b"GET /health /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "http in lower case": b"GET /v1/models http/1.1\r\nHost: x\r\n\r\n",
    "closed, then more": _request("GET /health", _HOST, b"Connection: close\r\n") + _PLAIN,
    "TLS": bytes.fromhex("16030100c6010000c20303") + b"\0" * 200,
    "garbage": b"\xff\xfe\0\0\r\n\r\n",
    "headers of proxies": _request(
        "GET /v1/models",
        _HOST,
        b"X-Forwarded-Prefix: /v1\r\nX-Original-URL: /health\r\nX-HTTP-Method-Override: OPTIONS\r\n",
    ),
    "another origin": _request("GET /v1/models", _HOST, b"Origin: http://y\r\n"),
    "preflight": _request(
        "OPTIONS /v1/models", _HOST, b"Origin: http://y\r\nAccess-Control-Request-Method: GET\r\n"
    ),
    "a long header": _request("GET /health", _HOST, b"X: " + b"a" * 60_000 + b"\r\n"),
    "a very long header": _request("GET /health", _HOST, b"X: " + b"a" * 200_000 + b"\r\n"),
    "many headers": _request("GET /health", _HOST, b"".join(b"X%d: a\r\n" % n for n in range(300))),
}

STRICTER: dict[str, list[int]] = {
    "target 'http://x:99999/v1/models'": [401],
    "0.9": [400],
    "2.0": [400],
    **{each: [400] for each in ("no host", "no host, key", "two hosts", "two hosts, key", "two spaces")},
    "h2c, then more": [200, 401],
    "a key in the trailer": [401],
    "encoding 'identity, chunked'": [400],
    "encoding 'gzip, chunked'": [400],
    "websocket, OPTIONS": [401],
    "websocket, POST": [401],
    "websocket, absolute": [401],
    "a very long header": [431],
}
"""What the gate answers where that is not what uvicorn with vLLM's middleware answers: it refuses more."""


def talk(port: int, content: bytes, seconds: float = 1.0) -> bytes:
    """Sends bytes at once, and returns what comes until nothing more comes for a while."""
    found = bytearray()
    with socket.create_connection(("127.0.0.1", port), timeout=_FIRST_SECONDS) as sock:
        try:
            sock.sendall(content)
            while piece := sock.recv(1 << 16):
                found += piece
                sock.settimeout(seconds)
        except (TimeoutError, ConnectionError):
            pass
    return bytes(found)


def statuses(content: bytes) -> list[int]:
    return [int(each) for each in re.findall(rb"HTTP/1\.[01] (\d{3})", content)]
