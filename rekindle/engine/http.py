# SPDX-License-Identifier: Apache-2.0
"""The engine for any HTTP server: a URL tells when it is ready, and a request from a file proves it.

The file holds one request as JSON: {"method", "path", "headers", "body"}. Its "select" may name the parts
of a JSON answer that count, as JSON pointers (RFC 6901): {"select": ["/choices/0/text"], …}. Without it,
the whole body counts.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from rekindle.digest import Digest
from rekindle.engine import Compiled, Endpoint, Engine, Request, variables
from rekindle.errors import FormatError, OracleError, UsageError
from rekindle.fields import JSON, Fields

if TYPE_CHECKING:
    from rekindle.engine.client import Client, Response

_TIMEOUT_SECONDS = 10.0
_UNZIPPED_LIMIT_BYTES = 64 << 20
# Of servers that are often behind such a URL: SGLang, llama.cpp, Ollama.
_READ = ("SGLANG_", "SGL_", "LLAMA_ARG_", "OLLAMA_")
_INDEX = re.compile(r"0|[1-9][0-9]*")


_URL_HINT = "write http://HOST:PORT/PATH"


class HttpEngine(Engine):
    """The engine for a server that only the user's options describe."""

    name = "http"
    compiles = False
    serves_one_port = False

    def __init__(self, *, endpoint: Endpoint, options: Mapping[str, JSON]) -> None:
        self.endpoint = endpoint
        self._options = dict(options)

    @classmethod
    def from_options(cls, ready_url: str, oracle_file: Path | None) -> "HttpEngine":
        """Create the engine from command-line options. Raises UsageError for an invalid URL or file."""
        try:
            url = urlsplit(ready_url)
            host, port = url.hostname, 80 if url.port is None else url.port
            ready_path = (url.path or "/") + (f"?{url.query}" if url.query else "")
            Request.from_json({"path": ready_path})
        except (ValueError, FormatError) as error:
            if "://" in ready_url:
                raise UsageError(
                    f"invalid --ready-url {ready_url!r}", cause=str(error), hint=_URL_HINT
                ) from error
            raise UsageError(f"invalid --ready-url {ready_url!r}", hint=_URL_HINT) from None
        if url.scheme != "http" or not host or not port:
            raise UsageError(f"invalid --ready-url {ready_url!r}", hint=_URL_HINT)
        options: dict[str, JSON] = {"ready_path": ready_path, "oracle": None, "select": []}
        if oracle_file is not None:
            try:
                content = json.loads(oracle_file.read_bytes())
                request = Request.from_json(content)
                options["oracle"] = request.to_json()
            except (OSError, ValueError, RecursionError, FormatError) as error:
                raise UsageError(
                    f"cannot read a request from --oracle-request {oracle_file}",
                    cause=str(error),
                    hint='write {"method": "POST", "path": "/…", "body": …, "select": ["/…"]}',
                ) from error
            from rekindle.secrets.redact import is_secret_name

            for name, value in request.headers.items():
                if is_secret_name(name) and not value.startswith("$"):
                    raise UsageError(
                        f"the header {name} in {oracle_file} holds a secret",
                        cause="the request becomes part of the image",
                        hint=f'write {{"{name}": "$VARIABLE"}} and set that environment variable',
                    )
            select = content.get("select", [])
            if not _is_pointers(select):
                raise UsageError(f'"select" in {oracle_file} is not a list of JSON pointers')
            options["select"] = select
        return cls(endpoint=Endpoint(host=host, port=port), options=options)

    @classmethod
    def from_record(cls, endpoint: Endpoint, options: Mapping[str, JSON]) -> "HttpEngine":
        """Create the engine from the `options` of a record. Raises FormatError if they are invalid."""
        fields = Fields(dict(options), "record.engine.options")
        Request.from_json({"path": fields.text("ready_path")})
        if (oracle := fields.json("oracle")) is not None:
            Request.from_json(oracle)
        if not _is_pointers(fields.json("select")):
            raise FormatError("record.engine.options.select is not a list of JSON pointers")
        return cls(endpoint=endpoint, options=options)

    def environment(self) -> Mapping[str, str]:
        return {}

    def cache_environment(self, directory: Path) -> Mapping[str, str]:  # noqa: ARG002
        return {}

    def reads(self, name: str) -> bool:
        return name.startswith(_READ) or variables.is_of_libraries(name)

    def model(self, argv: Sequence[str]) -> tuple[str, str] | None:  # noqa: ARG002
        return None

    def milestones(self) -> Sequence[tuple[str, str]]:
        return ()

    def compiled(self, log: str) -> Compiled:  # noqa: ARG002
        return Compiled()

    def disposable(self) -> Sequence[str]:
        return ()

    def options(self) -> dict[str, JSON]:
        return self._options

    def authorize(self, request: Request, environment: Mapping[str, str]) -> Request:
        """Replace header values such as `$TOKEN` by the variable's value, which is never recorded.

        Raises UsageError if the variable is missing or its value cannot be sent.
        """
        headers = dict(request.headers)
        for name, value in request.headers.items():
            if value.startswith("$"):
                if value[1:] not in environment:
                    raise UsageError(
                        f"the oracle's request needs the environment variable {value[1:]}",
                        hint=f"set it to the value of the header {name}",
                    )
                headers[name] = environment[value[1:]]
        try:
            return Request.from_json({**request.to_json(), "headers": headers})
        except FormatError:
            raise UsageError("the value of an environment variable cannot be sent as a header") from None

    def ready(self, client: "Client", timeout: float) -> bool:
        response = client.get(self._options["ready_path"], timeout=min(timeout, _TIMEOUT_SECONDS))
        return 200 <= response.status < 300

    def warm_requests(self, client: "Client") -> Sequence[Sequence[Request]]:
        return [[self.oracle_request(client)]]

    def oracle_request(self, client: "Client") -> Request:  # noqa: ARG002
        if self._options["oracle"]:
            return Request.from_json(self._options["oracle"])
        return Request(method="GET", path=self._options["ready_path"], headers={}, body=None)

    def answer(self, response: "Response") -> JSON:
        if not 200 <= response.status < 300:
            raise OracleError(
                f"the oracle's request was answered with status {response.status}",
                cause=response.body[:500].decode(errors="replace"),
            )
        if not self._options["select"]:
            return {"status": response.status, "body": Digest.of_bytes(response.body)}
        try:
            document = json.loads(_unzipped(response.body))
            values = [_at(document, pointer) for pointer in self._options["select"]]
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise OracleError(
                'the oracle\'s answer does not contain what "select" names', cause=repr(error)
            ) from error
        return {"status": response.status, "values": values}

    def agree(self, expected: JSON, got: JSON) -> bool:
        return bool(expected == got)


def _unzipped(body: bytes) -> bytes:
    """Return the text of a body, which some servers compress although they were not allowed to."""
    if not body.startswith(b"\x1f\x8b"):
        return body
    from zlib import decompressobj, error

    try:
        return decompressobj(wbits=31).decompress(body, _UNZIPPED_LIMIT_BYTES)
    except error as problem:
        raise ValueError(f"invalid gzip: {problem}") from None


def _at(document: JSON, pointer: str) -> JSON:
    """Return the value that a JSON pointer names. Raises LookupError, ValueError or TypeError."""
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(document, list):
            if not _INDEX.fullmatch(key):
                raise LookupError(f"invalid list index {key!r}")
            document = document[int(key)]
        else:
            document = document[key]
    return document


def _is_pointers(value: JSON) -> bool:
    return isinstance(value, list) and all(isinstance(p, str) and p[:1] in {"", "/"} for p in value)
