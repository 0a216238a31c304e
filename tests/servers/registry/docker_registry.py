# SPDX-License-Identifier: Apache-2.0
"""The real docker-registry (distribution 2.8) on loopback, with the three ways in that registries have.

It has no referrers API: whoever attaches something to an image needs the fallback tag there.
"""

import base64
import contextlib
import http.client
import http.server
import json
import os
import socket
import ssl
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Self
from urllib.parse import parse_qs, urlsplit

from tests.servers.registry.access import PASSWORD, USERNAME, Auth

# The registry takes bcrypt only, which Python has not; made with crypt(3) at the lowest cost that it takes.
_HTPASSWD = f"{USERNAME}:$2y$05$abcdefghijklmnopqrstuuHNbAKRhpaujgo33bRWs.NLUTJO3lOy2\n"
_SERVICE = "docker-registry"


class TokenServer:
    """Gives whoever has the password tokens that docker-registry believes; `scopes` is what was asked for."""

    def __init__(self, place: Path) -> None:
        self.scopes: list[list[str]] = []
        self.lifetime_seconds = 60
        self.certificate, self._key = place / "tokens.pem", place / "tokens.key"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tokens"),
                *("-days", "2", "-keyout", str(self._key), "-out", str(self.certificate)),
            ],
            check=True,
            capture_output=True,
            timeout=60,
        )
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                form = parse_qs(urlsplit(self.path).query)
                kind, _, credentials = self.headers.get("Authorization", "").partition(" ")
                wanted = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
                self.answer(form, kind == "Basic" and credentials == wanted)

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self.answer(form, form.get("username") == [USERNAME] and form.get("password") == [PASSWORD])

            def answer(self, form: dict[str, list[str]], known: bool) -> None:
                scopes = " ".join(form.get("scope", [])).split()
                owner.scopes.append(scopes)
                body = json.dumps(owner.answer(scopes) if known else {"details": "who are you?"}).encode()
                self.send_response(200 if known else 401)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        self.realm = f"http://127.0.0.1:{self._server.server_port}/token"

    def answer(self, scopes: list[str]) -> dict[str, object]:
        token = self.token(scopes)
        return {"token": token, "access_token": token, "expires_in": self.lifetime_seconds}

    def token(self, scopes: list[str]) -> str:
        """A JSON web token in the registry's dialect: github.com/distribution/distribution, spec/auth/jwt."""
        now = int(time.time())
        access = []
        for scope in scopes:
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            access.append({"type": kind, "name": name, "actions": actions.split(",")})
        certificate = "".join(
            line for line in self.certificate.read_text().splitlines() if not line.startswith("-")
        )
        header = {"typ": "JWT", "alg": "RS256", "x5c": [certificate]}
        claims = {
            "iss": "tokens",
            "aud": _SERVICE,
            "sub": USERNAME,
            "iat": now,
            "nbf": now - 5,
            "exp": now + self.lifetime_seconds,
            "jti": uuid.uuid4().hex,
            "access": access,
        }
        signed = f"{_base64url(json.dumps(header).encode())}.{_base64url(json.dumps(claims).encode())}"
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", str(self._key)],
            input=signed.encode(),
            check=True,
            capture_output=True,
            timeout=60,
        ).stdout
        return f"{signed}.{_base64url(signature)}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join(10)
        self._server.server_close()


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class DockerRegistry:
    """A running registry at `host`; its files are below `storage`, what it says is in `log`."""

    def __init__(
        self, program: Path, place: Path, auth: Auth = Auth.NONE, *, tls: tuple[Path, Path] | None = None
    ) -> None:
        """`tls` are a certificate and its key."""
        place.mkdir(parents=True)
        self.auth = auth
        self.log = place / "registry.log"
        self.storage = place / "storage"
        self.tokens: TokenServer | None = None
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{sock.getsockname()[1]}"
        config: dict[str, object] = {
            "version": "0.1",
            "log": {"level": "info"},
            "storage": {
                "filesystem": {"rootdirectory": str(self.storage)},
                "delete": {"enabled": True},
            },
            "http": {
                "addr": self.host,
                "secret": "of tests",
                **({"tls": {"certificate": str(tls[0]), "key": str(tls[1])}} if tls else {}),
            },
        }
        self._tls = tls is not None
        match auth:
            case Auth.NONE:
                pass
            case Auth.BASIC:
                (place / "htpasswd").write_text(_HTPASSWD)
                config["auth"] = {"htpasswd": {"realm": "tests", "path": str(place / "htpasswd")}}
            case Auth.TOKEN:
                self.tokens = TokenServer(place)
                config["auth"] = {
                    "token": {
                        "realm": self.tokens.realm,
                        "service": _SERVICE,
                        "issuer": "tokens",
                        "rootcertbundle": str(self.tokens.certificate),
                    }
                }
        path = place / "config.yml"
        path.write_text(json.dumps(config))  # JSON is YAML
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [str(program), "serve", str(path)],
                env={key: value for key, value in os.environ.items() if not key.startswith("REGISTRY_")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            assert self._process.poll() is None, self.log.read_text()
            connection = (
                http.client.HTTPSConnection(self.host, timeout=5, context=ssl._create_unverified_context())
                if self._tls
                else http.client.HTTPConnection(self.host, timeout=5)
            )
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/v2/")
                with connection.getresponse() as response:
                    assert response.status == (200 if self.auth is Auth.NONE else 401)
                return
            assert time.monotonic() < deadline, f"no answer: {self.log.read_text()}"
            time.sleep(0.02)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)
        if self.tokens:
            self.tokens.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
