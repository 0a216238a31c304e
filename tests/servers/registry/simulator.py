# SPDX-License-Identifier: Apache-2.0
"""A registry in the process of the test. It keeps to the OCI distribution specification 1.1, unless told.

    with Registry(misbehave=[status(503, on=blob(), times=2)]) as registry:
        digest = registry.add_blob("a/b", b"hello")
        …                                                 # a client uses http://{registry.host}
        assert len(registry.downloads(digest)) == 3

A request goes through authentication, then through each misbehaviour (see misbehaviour.py), then to the
registry's own answer; what comes of it is an `Answer`, which says what is sent and how. A second server,
`elsewhere`, is another host for the same content: where redirects lead. It asks nobody who he is, and like
real ones refuses who tells it (400).
"""

import base64
import contextlib
import hashlib
import json
import mmap
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, quote

from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.wire import Answer, Content, Kind, Request, Server

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
EMPTY = "application/vnd.oci.empty.v1+json"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}")
_LARGEST_MANIFEST_BYTES = 4 << 20


Misbehave = Callable[[Request, Callable[[Request], Answer]], Answer]


def error(status: int, code: str, message: str = "", **headers: str) -> Answer:
    """An error as the specification writes it. Keywords are headers, with _ for -."""
    body = json.dumps({"errors": [{"code": code, "message": message, "detail": None}]}).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status=status, headers={"Content-Type": "application/json", **named}, body=body)


def digest_of(data: Content) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


@dataclass(slots=True)
class _Repository:
    blobs: dict[str, Content] = field(default_factory=dict)
    manifests: dict[str, tuple[str, bytes]] = field(default_factory=dict)  # media type, content
    tags: dict[str, str] = field(default_factory=dict)
    sessions: dict[str, bytearray] = field(default_factory=dict)


class Registry:
    """A registry at `host`, with its content in memory.

    `requests` has all that was ever asked, in order; `most_at_once` is how many were in work at one time.
    `rate_bytes_per_second` bounds each request, both ways, as many proxies do. `page_size` bounds the lists
    of tags and referrers. `anonymous_pull` lets who has no password read. `realm` is where challenges send
    for tokens, in place of our own endpoint.
    """

    def __init__(
        self,
        *,
        auth: Auth = Auth.NONE,
        misbehave: Iterable[Misbehave] = (),
        anonymous_pull: bool = False,
        realm: str | None = None,
        token_seconds: float = 300,
        page_size: int | None = None,
        rate_bytes_per_second: float | None = None,
    ) -> None:
        self.auth = auth
        self.misbehaviours: list[Misbehave] = list(misbehave)
        self.anonymous_pull = anonymous_pull
        self.token_seconds = token_seconds
        self.page_size = page_size
        self.rate_bytes_per_second = rate_bytes_per_second
        self.requests: list[Request] = []
        self.repositories: dict[str, _Repository] = {}
        self.tokens: dict[str, tuple[frozenset[tuple[str, str]], float]] = {}  # (repository, action), end
        self.refresh_token = secrets.token_urlsafe()
        self.dead_tickets: set[str] = set()  # links to `elsewhere` that have expired
        self.lock = threading.Lock()
        self.most_at_once = self._at_once = 0
        self._closing = threading.Event()
        self._faults: list[BaseException] = []
        self._servers = [Server(self, 0, elsewhere=False), Server(self, 0, elsewhere=True)]
        self.host, self.elsewhere = (f"127.0.0.1:{server.port}" for server in self._servers)
        self.realm = realm or f"http://{self.host}/token"

    # What a test does

    def add_blob(self, repository: str, data: Content | Path) -> str:
        """The digest of a blob that is now there; a file is mapped, not read into memory."""
        if isinstance(data, Path):
            with open(data, "rb") as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        digest = digest_of(data)
        self.repositories.setdefault(repository, _Repository()).blobs[digest] = data
        return digest

    def add_manifest(
        self, repository: str, manifest: bytes | dict[str, Any], tag: str | None = None, media_type: str = ""
    ) -> str:
        """The digest of a manifest that is now there, whatever it says, under a tag if that is given."""
        if isinstance(manifest, dict):
            media_type = media_type or manifest.get("mediaType", "")
            manifest = json.dumps(manifest).encode()
        digest = digest_of(manifest)
        there = self.repositories.setdefault(repository, _Repository())
        there.manifests[digest] = (media_type or MANIFEST, manifest)
        if tag:
            there.tags[tag] = digest
        return digest

    def add_image(self, repository: str, tag: str | None, *layers: Content, **more: Any) -> str:
        """The digest of an image of these layers; `more` are fields of its manifest, such as subject."""

        def descriptor(data: Content, media_type: str) -> dict[str, Any]:
            return {"mediaType": media_type, "digest": self.add_blob(repository, data), "size": len(data)}

        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": descriptor(b"{}", EMPTY),
            "layers": [descriptor(layer, "application/octet-stream") for layer in layers],
        }
        return self.add_manifest(repository, manifest | more, tag)

    def misbehave(self, *misbehaviours: Misbehave) -> None:
        self.misbehaviours.extend(misbehaviours)

    def behave(self) -> None:
        self.misbehaviours.clear()

    def asked(
        self,
        method: str | None = None,
        kind: Kind | None = None,
        reference: str | None = None,
        *,
        elsewhere: bool | None = None,
    ) -> list[Request]:
        """The requests that were these."""
        return [
            request
            for request in self.requests
            if method in (None, request.method)
            and kind in (None, request.kind)
            and reference in (None, request.reference)
            and elsewhere in (None, request.elsewhere)
        ]

    def downloads(self, digest: str | None = None) -> list[Request]:
        return self.asked("GET", Kind.BLOB, digest)

    def uploads(self, digest: str | None = None) -> list[Request]:
        """The requests that would have ended an upload, whether they did or not."""
        return [r for r in self.asked(None, Kind.UPLOAD, digest) if "digest" in r.query]

    @property
    def sent_bytes(self) -> int:
        return sum(request.sent_bytes for request in self.requests)

    @property
    def received_bytes(self) -> int:
        return sum(request.body_bytes for request in self.requests)

    @property
    def leaks(self) -> list[Request]:
        """Requests that told another host who the client is."""
        there = self.asked(elsewhere=True)
        return [r for r in there if "authorization" in r.headers and r.kind is not Kind.TOKEN]

    def settle(self) -> None:
        """Waits until nothing is left to do of clients that are gone: what they asked for last is served none
        the less, as by any server."""
        for server in self._servers[-2:]:
            server.settle()

    def pause(self) -> None:
        """Breaks all connections and refuses new ones, until `resume`."""
        for server in self._servers[-2:]:
            server.stop_listening()

    def resume(self) -> None:
        with self.lock:
            if not self._closing.is_set():
                self._servers += [Server(self, s.port, elsewhere=s.elsewhere) for s in self._servers[-2:]]

    def close(self) -> None:
        """Ends all connections and threads; raises what went wrong in the simulator itself."""
        with self.lock:
            self._closing.set()
        for server in self._servers:
            server.stop_listening()
        for server in self._servers:
            server.server_close()
        if self._faults:
            raise self._faults[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What servers and misbehaviours use

    def wait(self, seconds: float | None = None) -> None:
        """Waits, or until the registry is closed."""
        self._closing.wait(seconds)

    def pace(self, started: float, done_bytes: int, bytes_per_second: float | None) -> None:
        if bytes_per_second and (ahead := started + done_bytes / bytes_per_second - time.monotonic()) > 0:
            self.wait(ahead)

    def fault(self, problem: BaseException) -> None:
        self._faults.append(problem)

    @contextlib.contextmanager
    def in_work(self) -> Iterator[None]:
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self.lock:
                self._at_once -= 1

    def _repository(self, name: str) -> _Repository:
        return self.repositories.get(name) or _Repository()

    def content(self, request: Request) -> Content | None:
        """What a GET of a blob or manifest would serve."""
        there = self._repository(request.repository)
        if request.kind is Kind.BLOB:
            return there.blobs.get(request.reference)
        found = there.manifests.get(there.tags.get(request.reference, request.reference))
        return found[1] if found else None

    def answer(self, request: Request) -> Answer:
        if request.elsewhere:
            if "authorization" in request.headers and request.kind is not Kind.TOKEN:
                return error(400, "DENIED", "only one way to sign in is allowed")
            if request.query.get("ticket") in self.dead_tickets:
                return error(403, "DENIED", "this link has expired")
        elif refused := self._refuse(request):
            return refused
        return self._misbehaved(request, self.misbehaviours)

    def _misbehaved(self, request: Request, misbehaviours: Sequence[Misbehave]) -> Answer:
        if not misbehaviours:
            return self.behaved(request)
        first, *others = misbehaviours
        return first(request, lambda changed: self._misbehaved(changed, others))

    # Who may

    def _refuse(self, request: Request) -> Answer | None:
        if self.auth is Auth.NONE or request.kind is Kind.TOKEN:
            return None
        reading = request.method in ("GET", "HEAD") and request.kind is not Kind.UPLOAD
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if self.auth is Auth.BASIC:
            if (scheme == "Basic" and self._known(credentials)) or (reading and self.anonymous_pull):
                return None
            return self.challenge(request)
        granted, end = self.tokens.get(credentials, (None, 0.0)) if scheme == "Bearer" else (None, 0.0)
        if granted is None or end < time.monotonic():
            return self.challenge(request, "invalid_token" if credentials else "")
        wanted = {"pull"} if reading else {"pull", "push"}
        if request.repository and any((request.repository, action) not in granted for action in wanted):
            return self.challenge(request, "insufficient_scope")
        return None

    def _known(self, credentials: str) -> bool:
        return credentials == base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()

    def challenge(self, request: Request, problem: str = "") -> Answer:
        """A 401 that says what to bring."""
        if self.auth is Auth.TOKEN:
            value = f'Bearer realm="{self.realm}",service="{self.host}"'
            if request.repository:
                reading = request.method in ("GET", "HEAD") and request.kind is not Kind.UPLOAD
                value += f',scope="repository:{request.repository}:{"pull" if reading else "pull,push"}"'
            value += f',error="{problem}"' if problem else ""
        else:
            value = 'Basic realm="tests"'
        return error(401, "UNAUTHORIZED", "authentication required", WWW_Authenticate=value)

    def _token(self, request: Request) -> Answer:
        if request.method == "POST":
            form = parse_qs(request.body().decode())
            grant = form.get("grant_type", [""])[0]
            known = (
                form.get("refresh_token") == [self.refresh_token]
                if grant == "refresh_token"
                else form.get("username") == [USERNAME] and form.get("password") == [PASSWORD]
            )
            anonymous = False
        else:
            form = parse_qs(request.query_string)
            authorization = request.headers.get("authorization", "")
            known = self._known(authorization.removeprefix("Basic "))
            anonymous = self.anonymous_pull and not authorization
        if not (known or anonymous):
            return error(401, "UNAUTHORIZED", "wrong user name or password")
        granted = set()
        for scope in " ".join(form.get("scope", [])).split():
            kind, _, rest = scope.partition(":")
            name, _, actions = rest.rpartition(":")
            if kind == "repository":
                granted |= {(name, action) for action in actions.split(",") if known or action == "pull"}
        token = secrets.token_urlsafe()
        self.tokens[token] = (frozenset(granted), time.monotonic() + self.token_seconds)
        fields = {"token": token, "access_token": token, "expires_in": int(self.token_seconds)}
        if request.method == "POST":
            fields["refresh_token"] = self.refresh_token
        return _json_answer(fields)

    # What the specification says

    def behaved(self, request: Request) -> Answer:
        match request.kind:
            case Kind.BASE:
                return _json_answer({})
            case Kind.TOKEN:
                return self._token(request)
            case Kind.MANIFEST:
                return self._manifest(request)
            case Kind.BLOB:
                return self._blob(request)
            case Kind.UPLOAD:
                return self._upload(request)
            case Kind.TAGS:
                return self._tags(request)
            case Kind.REFERRERS:
                return self._referrers(request)
            case Kind.OTHER:
                return error(404, "UNSUPPORTED", "there is nothing here")

    def _manifest(self, request: Request) -> Answer:
        there = self._repository(request.repository)
        if request.method == "PUT":
            return self._put_manifest(request, there)
        digest = there.tags.get(request.reference, request.reference)
        if digest not in there.manifests:
            return error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        if request.method == "DELETE":
            if request.reference in there.tags:
                del there.tags[request.reference]
            else:
                del there.manifests[digest]
                there.tags = {tag: to for tag, to in there.tags.items() if to != digest}
            return Answer(status=202)
        if request.method not in ("GET", "HEAD"):
            return error(405, "UNSUPPORTED")
        media_type, content = there.manifests[digest]
        accepted = [
            word.partition(";")[0].strip() for word in request.headers.get("accept", "*/*").split(",")
        ]
        if not {"*/*", "application/*", media_type} & set(accepted):
            return error(404, "MANIFEST_UNKNOWN", f"{media_type} is not accepted")
        headers = {"Content-Type": media_type, "Docker-Content-Digest": digest}
        return Answer(headers=headers, body=content if request.served is None else request.served)

    def _put_manifest(self, request: Request, there: _Repository) -> Answer:
        content = bytes(request.body())
        if len(content) > _LARGEST_MANIFEST_BYTES:
            return error(413, "SIZE_INVALID", "manifest too large")
        digest = digest_of(content)
        if request.reference != digest and not _TAG.fullmatch(request.reference):
            return error(400, "DIGEST_INVALID", "the digest is not that of the content")
        media_type = request.headers.get("content-type", "")
        try:
            manifest = json.loads(content)
            if manifest.get("mediaType", media_type) != media_type:
                return error(400, "MANIFEST_INVALID", "Content-Type is not mediaType")
            parts = [manifest[name] for name in ("config",) if name in manifest] + manifest.get("layers", [])
            missing = [part["digest"] for part in parts if part["digest"] not in there.blobs]
            missing += [
                m["digest"] for m in manifest.get("manifests", []) if m["digest"] not in there.manifests
            ]
            subject = manifest["subject"]["digest"] if manifest.get("subject") else None
        except (ValueError, LookupError, TypeError, AttributeError) as problem:
            return error(400, "MANIFEST_INVALID", repr(problem))
        if missing:
            return error(400, "MANIFEST_BLOB_UNKNOWN", f"not here: {' '.join(missing)}")
        self.repositories[request.repository] = there
        there.manifests[digest] = (media_type, content)
        if request.reference != digest:
            there.tags[request.reference] = digest
        headers = {
            "Location": f"/v2/{request.repository}/manifests/{digest}",
            "Docker-Content-Digest": digest,
        }
        return Answer(status=201, headers=headers | ({"OCI-Subject": subject} if subject else {}))

    def _blob(self, request: Request) -> Answer:
        there = self._repository(request.repository)
        if not _DIGEST.fullmatch(request.reference):
            return error(400, "DIGEST_INVALID", "not a digest")
        if request.reference not in there.blobs:
            return error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if request.method == "DELETE":
            del there.blobs[request.reference]
            return Answer(status=202)
        if request.method not in ("GET", "HEAD"):
            return error(405, "UNSUPPORTED")
        content = memoryview(there.blobs[request.reference] if request.served is None else request.served)
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": request.reference,
            "Accept-Ranges": "bytes",
        }
        stretch = parse_range(request.headers.get("range", ""), len(content))
        if stretch is None:
            return Answer(headers=headers, body=content)
        if not stretch:
            headers = {"Content-Range": f"bytes */{len(content)}"}
            return Answer(status=416, headers=headers)
        headers["Content-Range"] = f"bytes {stretch.start}-{stretch.stop - 1}/{len(content)}"
        return Answer(status=206, headers=headers, body=content[stretch.start : stretch.stop])

    def _upload(self, request: Request) -> Answer:
        there = self.repositories.setdefault(request.repository, _Repository())
        if not request.session:
            return self._begin(request, there) if request.method == "POST" else error(405, "UNSUPPORTED")
        if request.session not in there.sessions:
            return error(404, "BLOB_UPLOAD_UNKNOWN", "upload unknown to registry")
        received = there.sessions[request.session]
        match request.method:
            case "GET":
                return self._session(request, request.session, 204)
            case "DELETE":
                del there.sessions[request.session]
                return Answer(status=204)
            case "PATCH" | "PUT":
                start = request.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
                body = request.body()
                if start and int(start) != len(received):
                    return self._session(request, request.session, 416)
                if not received:
                    received = there.sessions[request.session] = body  # no copy of something large
                else:
                    received += body
                if request.method == "PATCH":
                    return self._session(request, request.session, 202)
                return self._finish(request, there, request.session, received)
            case _:
                return error(405, "UNSUPPORTED")

    def _begin(self, request: Request, there: _Repository) -> Answer:
        if digest := request.query.get("mount"):
            source = self._repository(request.query.get("from", ""))
            if digest in source.blobs and self._may_read(request, request.query["from"]):
                there.blobs[digest] = source.blobs[digest]
                return self._created(request, digest)
        session = secrets.token_hex(8)
        if "digest" in request.query:
            return self._finish(request, there, session, request.body())
        there.sessions[session] = bytearray()
        return self._session(request, session, 202)

    def _may_read(self, request: Request, repository: str) -> bool:
        credentials = request.headers.get("authorization", "").partition(" ")[2]
        return self.auth is not Auth.TOKEN or (repository, "pull") in self.tokens[credentials][0]

    def _session(self, request: Request, session: str, status: int) -> Answer:
        headers = {
            "Location": f"/v2/{request.repository}/blobs/uploads/{session}",
            "Docker-Upload-UUID": session,
        }
        if received := len(self._repository(request.repository).sessions[session]):
            headers["Range"] = f"0-{received - 1}"
        return Answer(status=status, headers=headers)

    def _finish(self, request: Request, there: _Repository, session: str, content: bytearray) -> Answer:
        digest = request.query.get("digest", "")
        if digest_of(content) != digest:
            return error(400, "DIGEST_INVALID", "the digest is not that of the content")
        there.sessions.pop(session, None)
        there.blobs[digest] = content
        return self._created(request, digest)

    def _created(self, request: Request, digest: str) -> Answer:
        headers = {"Location": f"/v2/{request.repository}/blobs/{digest}", "Docker-Content-Digest": digest}
        return Answer(status=201, headers=headers)

    def _tags(self, request: Request) -> Answer:
        if request.repository not in self.repositories:
            return error(404, "NAME_UNKNOWN", "repository name not known to registry")
        tags = sorted(self._repository(request.repository).tags, key=str.lower)
        tags, link = self._page(request, tags, tags)
        answer = _json_answer({"name": request.repository, "tags": tags})
        answer.headers |= link
        return answer

    def _referrers(self, request: Request) -> Answer:
        if not _DIGEST.fullmatch(request.reference):
            return error(400, "DIGEST_INVALID", "not a digest")
        found: list[dict[str, Any]] = []
        for digest, (media_type, content) in list(self._repository(request.repository).manifests.items()):
            about: dict[str, Any]
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                manifest = json.loads(content)
                if manifest["subject"]["digest"] == request.reference:
                    about = {"mediaType": media_type, "digest": digest, "size": len(content)}
                    kind = manifest.get("artifactType") or manifest.get("config", {}).get("mediaType", "")
                    about["artifactType"] = kind
                    if "annotations" in manifest:
                        about["annotations"] = manifest["annotations"]
                    found.append(about)
        headers = {"Content-Type": INDEX}
        if wanted := request.query.get("artifactType"):
            found = [about for about in found if about["artifactType"] == wanted]
            headers["OCI-Filters-Applied"] = "artifactType"
        found, link = self._page(request, found, [about["digest"] for about in found])
        body = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": found}).encode()
        return Answer(headers=headers | link, body=body)

    def _page(self, request: Request, items: list[Any], names: list[str]) -> tuple[list[Any], dict[str, str]]:
        last = request.query.get("last")
        start = names.index(last) + 1 if last in names else 0
        count = int(request.query.get("n", self.page_size or len(items)))
        count = min(count, self.page_size or count)
        page = items[start : start + count]
        if not page or start + count >= len(items):
            return page, {}
        others = "".join(f"&{k}={quote(v)}" for k, v in request.query.items() if k not in ("n", "last"))
        link = f"{request.path}?n={count}&last={quote(names[start + count - 1])}{others}"
        return page, {"Link": f'<{link}>; rel="next"'}


def _json_answer(value: object) -> Answer:
    return Answer(headers={"Content-Type": "application/json"}, body=json.dumps(value).encode())


def parse_range(header: str, size: int) -> range | None:
    """The bytes that a Range header means: None for all of them, empty for none that are there."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if not match or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if not first:
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None
    return range(int(first), min(size, int(last) + 1 if last else size))
