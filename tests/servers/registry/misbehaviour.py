# SPDX-License-Identifier: Apache-2.0
"""What registries, and what stands before them, do wrong. A test declares it: `Registry(misbehave=[…])`.

Each function here makes a `Misbehaviour`: it takes what it concerns, `on=`, mostly made by `blob(digest)`,
`manifest(reference)`, `upload(…)`, `REFERRERS`, `TOKEN` or `On(…)`; how often, `times=` (for ever unless
given); and how many such requests pass before, `skip=`. Of several, the first is the outermost: it sees what
the others made of the answer. Requests that authentication refuses do not reach them, nor count. Make
each for one registry: they count.

    status(429, retry_after=1, on=blob(), times=2)
    resets(blob(digest), after_bytes=1000, times=3)
    redirects(blob()), wrong_bytes(digest, elsewhere=True)
    Misbehaviour(on=TAGS, act=lambda request, proceed: proceed(request))
"""

import email.utils
import gzip
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from tests.servers.registry.simulator import INDEX, Registry, digest_of, error, parse_range
from tests.servers.registry.wire import Answer, Content, Ending, Kind, Request

Matches = Callable[[Request], bool]
Proceed = Callable[[Request], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class On:
    """Which requests are meant: those that fit all that is given. `parameter` must be in the query."""

    method: str | None = None
    kind: Kind | None = None
    reference: str | None = None
    parameter: str | None = None
    elsewhere: bool = False

    def __call__(self, request: Request) -> bool:
        return (
            self.method in (None, request.method)
            and self.kind in (None, request.kind)
            and self.reference in (None, request.reference)
            and (self.parameter is None or self.parameter in request.query)
            and self.elsewhere == request.elsewhere
        )


ANYTHING = On()
TAGS = On(kind=Kind.TAGS)
REFERRERS = On(kind=Kind.REFERRERS)
TOKEN = On(kind=Kind.TOKEN)
MOUNT = On(kind=Kind.UPLOAD, method="POST", parameter="mount")


def blob(digest: str | None = None, method: str | None = "GET", *, elsewhere: bool = False) -> On:
    return On(kind=Kind.BLOB, method=method, reference=digest, elsewhere=elsewhere)


def manifest(reference: str | None = None, method: str | None = "GET") -> On:
    return On(kind=Kind.MANIFEST, method=method, reference=reference)


def upload(digest: str | None = None, method: str | None = "PUT", *, elsewhere: bool = False) -> On:
    """The PUT that ends an upload, or one of its other requests: those know no digest."""
    return On(kind=Kind.UPLOAD, method=method, reference=digest, elsewhere=elsewhere)


A_BLOB = blob()


@dataclass(slots=True, kw_only=True)
class Misbehaviour:
    """Calls `act` instead of going on, for the requests that are meant; `act` may go on itself."""

    on: Matches
    act: Callable[[Request, Proceed], Answer]
    times: int | None = None
    skip: int = 0
    _seen: int = field(default=0, init=False)

    def __call__(self, request: Request, proceed: Proceed) -> Answer:
        if not self.on(request):
            return proceed(request)
        with request.registry.lock:
            self._seen += 1
            number = self._seen - self.skip
        if number < 1 or (self.times is not None and number > self.times):
            return proceed(request)
        return self.act(request, proceed)


def _changes(on: Matches, change: Callable[[Request, Answer], Answer], **often: Any) -> Misbehaviour:
    """Lets the registry answer, and changes what it says if it is not an error."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        return change(request, answer) if answer.status < 400 else answer

    return Misbehaviour(on=on, act=act, **often)


# Content


def _serves(on: Matches, change: Callable[[Content], Content], **often: Any) -> Misbehaviour:
    def act(request: Request, proceed: Proceed) -> Answer:
        content = request.registry.content(request)
        if content is not None:
            request.served = change(content)
        return proceed(request)

    return Misbehaviour(on=on, act=act, **often)


def _flipped(content: Content, position: int | None) -> Content:
    changed = bytearray(content)
    changed[len(changed) // 2 if position is None else position] ^= 0xFF
    return changed


def wrong_bytes(
    digest: str, *, at: int | None = None, method: str | None = "GET", elsewhere: bool = False, **often: Any
) -> Misbehaviour:
    """One byte of a blob is another, that in the middle unless said; HEAD and ranges agree with it."""
    return _serves(blob(digest, method, elsewhere=elsewhere), lambda c: _flipped(c, at), **often)


def too_many_bytes(
    digest: str, extra: int = 1, *, method: str | None = None, elsewhere: bool = False, **often: Any
) -> Misbehaviour:
    on = blob(digest, method, elsewhere=elsewhere)
    return _serves(on, lambda c: bytes(c) + bytes(extra), **often)


def too_few_bytes(
    digest: str, missing: int = 1, *, method: str | None = None, elsewhere: bool = False, **often: Any
) -> Misbehaviour:
    return _serves(blob(digest, method, elsewhere=elsewhere), lambda c: c[: len(c) - missing], **often)


def other_manifest(reference: str, content: bytes, **often: Any) -> Misbehaviour:
    """A manifest, or what is none, under the name, media type and Docker-Content-Digest of another."""
    return _serves(manifest(reference, None), lambda _: content, **often)


def tag_moves(tag: str, digest: str, *, method: str = "HEAD") -> Misbehaviour:
    """Right after it was first asked for, the tag means another manifest."""

    def act(request: Request, proceed: Proceed) -> Answer:
        answer = proceed(request)
        request.registry.repositories[request.repository].tags[tag] = digest
        return answer

    return Misbehaviour(on=manifest(tag, method), act=act, times=1)


def chunked(on: Matches, **often: Any) -> Misbehaviour:
    """No Content-Length."""
    return _changes(on, lambda _, a: replace(a, chunked=True), **often)


def gzipped(on: Matches, **often: Any) -> Misbehaviour:
    """Content-Encoding: gzip, though nobody asked."""

    def change(_: Request, answer: Answer) -> Answer:
        headers = answer.headers | {"Content-Encoding": "gzip"}
        return replace(answer, headers=headers, body=gzip.compress(answer.body, 1))

    return _changes(on, change, **often)


# Statuses and headers


def status(
    code: int,
    *,
    on: Matches,
    retry_after: float | str | None = None,
    early: bool = False,
    **often: Any,
) -> Misbehaviour:
    """An error instead of an answer. `retry_after`: seconds, or what shall stand there (see `http_date`).

    Of an upload it comes after all bytes, or `early`, before them, with the connection closed.
    """

    def act(request: Request, _: Proceed) -> Answer:
        names = {401: "UNAUTHORIZED", 403: "DENIED", 404: "NAME_UNKNOWN", 429: "TOOMANYREQUESTS"}
        answer = error(code, names.get(code, "UNKNOWN"), "the test said so")
        if retry_after is not None:
            answer.headers["Retry-After"] = str(retry_after)
        if early:
            answer.headers["Connection"], answer.ending = "close", Ending.CLOSE
        return answer

    return Misbehaviour(on=on, act=act, **often)


def http_date(seconds: float) -> str:
    """The time in so many seconds, for Retry-After."""
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


def answers(
    on: Matches, body: Content = b"", *, code: int = 200, headers: dict[str, str] | None = None, **often: Any
) -> Misbehaviour:
    """This, whatever was asked."""
    return Misbehaviour(
        on=on, act=lambda *_: Answer(status=code, headers=dict(headers or {}), body=body), **often
    )


def fails_after(on: Matches, code: int = 500, **often: Any) -> Misbehaviour:
    """The registry does it, then says that it failed."""
    return _changes(on, lambda *_: error(code, "UNKNOWN", "the test said so"), **often)


def header(on: Matches, name: str, value: str | None, **often: Any) -> Misbehaviour:
    """Sets a header of the answer, or leaves it out (None): a Docker-Content-Digest that lies, huge ones…"""

    def change(_: Request, answer: Answer) -> Answer:
        others = {key: v for key, v in answer.headers.items() if key != name}
        return replace(answer, headers=others | ({} if value is None else {name: value}))

    return _changes(on, change, **often)


def content_length(on: Matches, delta: int, **often: Any) -> Misbehaviour:
    """Content-Length is more than comes, then the connection is closed; or less."""

    def change(_: Request, answer: Answer) -> Answer:
        headers = answer.headers | {"Content-Length": str(len(answer.body) + delta)}
        return replace(answer, headers=headers, ending=Ending.CLOSE)

    return _changes(on, change, **often)


# Connections


def _ends(on: Matches, ending: Ending, after_bytes: int, **often: Any) -> Misbehaviour:
    def act(request: Request, proceed: Proceed) -> Answer:
        if request.method in ("PUT", "PATCH", "POST"):
            request.read(max(after_bytes, 0))
            return Answer(cut_after=-1, ending=ending)
        return replace(proceed(request), cut_after=after_bytes, ending=ending)

    return Misbehaviour(on=on, act=act, **often)


def closes(on: Matches, after_bytes: int = -1, **often: Any) -> Misbehaviour:
    """Closes in the middle: of what it sends, after so many bytes of the body, or (-1) before it answers;
    of an upload, after so many bytes that came."""
    return _ends(on, Ending.CLOSE, after_bytes, **often)


def resets(on: Matches, after_bytes: int = -1, **often: Any) -> Misbehaviour:
    """As `closes`, with a reset. Of what was sent just before it, the client may lose some."""
    return _ends(on, Ending.RESET, after_bytes, **often)


def stalls(on: Matches, after_bytes: int = 0, **often: Any) -> Misbehaviour:
    """As `closes`, but holds the connection open and says no more; 0 is after the headers."""
    return _ends(on, Ending.STALL, after_bytes, **often)


def hangs_up(on: Matches, **often: Any) -> Misbehaviour:
    """Answers well, then closes the connection, unannounced: the next request on it fails."""
    return _changes(on, lambda _, a: replace(a, ending=Ending.CLOSE), **often)


def slow(on: Matches, bytes_per_second: float = 1, **often: Any) -> Misbehaviour:
    """Sends at this rate; 1 drips."""
    return _changes(on, lambda _, a: replace(a, bytes_per_second=bytes_per_second), **often)


def late(on: Matches, seconds: float, **often: Any) -> Misbehaviour:
    """Answers well, so much later."""

    def act(request: Request, proceed: Proceed) -> Answer:
        request.registry.wait(seconds)
        return proceed(request)

    return Misbehaviour(on=on, act=act, **often)


def restarts(on: Matches, down_seconds: float = 0.2, **often: Any) -> Misbehaviour:
    """All connections break, and new ones are refused for a while."""

    def act(request: Request, _: Proceed) -> Answer:
        request.registry.pause()
        request.registry.wait(down_seconds)
        request.registry.resume()
        return Answer(cut_after=-1, ending=Ending.CLOSE)

    return Misbehaviour(on=on, act=act, **often)


# Ranges


def ignores_range(on: Matches = A_BLOB, **often: Any) -> Misbehaviour:
    """200 with all of it."""
    return another_range(on, lambda _: None, lie=False, **often)


def another_range(
    on: Matches,
    other: Callable[[range], range | None],
    *,
    lie: bool,
    **often: Any,
) -> Misbehaviour:
    """The bytes of another range than asked, with its Content-Range, or (`lie`) that of the one asked."""

    def act(request: Request, proceed: Proceed) -> Answer:
        size = len(request.registry.content(request) or b"")
        asked = parse_range(request.headers.get("range", ""), size)
        if asked is None:
            return proceed(request)
        others = {name: value for name, value in request.headers.items() if name != "range"}
        if stretch := other(asked):
            others["range"] = f"bytes={stretch.start}-{stretch.stop - 1}"
        answer = proceed(replace(request, headers=others))
        if lie:
            answer.headers["Content-Range"] = f"bytes {asked.start}-{asked.stop - 1}/{size}"
        return answer

    return Misbehaviour(on=on, act=act, **often)


# Redirects


def redirects(
    on: Matches,
    code: int = 307,
    *,
    to: str | None = None,
    expired: int = 0,
    **often: Any,
) -> Misbehaviour:
    """To the same on the other host, where the first `expired` links no longer work; or to a URL.

    `to` may be what no client should follow, such as file:///etc/passwd; "" is to itself, for ever.
    """
    links = 0

    def act(request: Request, proceed: Proceed) -> Answer:
        nonlocal links
        answer = proceed(request)
        if answer.status >= 400:
            return answer
        location = to
        if location is None:
            with request.registry.lock:
                links += 1
                ticket = f"{id(links)}-{links}"
                if links <= expired:
                    request.registry.dead_tickets.add(ticket)
            location = f"http://{request.registry.elsewhere}{request.path}?ticket={ticket}"
        return Answer(status=code, headers={"Location": location or request.path})

    return Misbehaviour(on=on, act=act, **often)


def web_page(on: Matches = REFERRERS) -> list[Misbehaviour]:
    """303 to a page for people, as GHCR answers about referrers. A list: add it with *."""
    page = "/web/page"
    there = Misbehaviour(
        on=lambda request: request.elsewhere and request.path == page,
        act=lambda *_: Answer(headers={"Content-Type": "text/html"}, body=b"<html>hello</html>"),
    )
    here = Misbehaviour(
        on=on,
        act=lambda request, _: Answer(
            status=303, headers={"Location": f"http://{request.registry.elsewhere}{page}"}
        ),
    )
    return [here, there]


# Uploads


def upload_location(form: str, **often: Any) -> Misbehaviour:
    """How Location of an upload is written: "relative", "absolute", "query" or "elsewhere" (another host)."""

    def change(request: Request, answer: Answer) -> Answer:
        if location := answer.headers.get("Location"):
            match form:
                case "absolute":
                    location = f"http://{request.registry.host}{location}"
                case "query":
                    location = f"{location}?_state={quote('a+b/c=&')}"
                case "elsewhere":
                    location = f"http://{request.registry.elsewhere}{location}"
                case _:
                    assert form == "relative", form
        return replace(answer, headers=answer.headers | ({"Location": location} if location else {}))

    return _changes(lambda r: r.kind is Kind.UPLOAD and "digest" not in r.query, change, **often)


def ignores_mounts(**often: Any) -> Misbehaviour:
    """202: an upload is begun, though the blob could be mounted."""

    def act(request: Request, proceed: Proceed) -> Answer:
        request.body()
        return proceed(replace(request, query={}))

    return Misbehaviour(on=MOUNT, act=act, **often)


# Tokens


def tokens_expire(after: int) -> Misbehaviour:
    """Each token is good for so many requests, then it is refused."""
    used: dict[str, int] = {}

    def act(request: Request, proceed: Proceed) -> Answer:
        token = request.headers.get("authorization", "")
        with request.registry.lock:
            used[token] = used.get(token, 0) + 1
        return (
            proceed(request) if used[token] <= after else request.registry.challenge(request, "invalid_token")
        )

    return Misbehaviour(on=lambda r: r.kind is not Kind.TOKEN and not r.elsewhere, act=act)


def unauthorized(on: Matches = ANYTHING, **often: Any) -> Misbehaviour:
    """401 with a challenge, whatever the client brings."""
    return Misbehaviour(
        on=lambda r: r.kind is not Kind.TOKEN and on(r),
        act=lambda request, _: request.registry.challenge(request),
        **often,
    )


# Referrers


def no_referrers() -> Misbehaviour:
    """Does not know them: 404, and no OCI-Subject."""

    def act(request: Request, proceed: Proceed) -> Answer:
        if request.kind is Kind.REFERRERS:
            return error(404, "UNSUPPORTED")
        answer = proceed(request)
        answer.headers.pop("OCI-Subject", None)
        return answer

    return Misbehaviour(on=lambda r: r.kind in (Kind.REFERRERS, Kind.MANIFEST), act=act)


def lying_referrers(registry: Registry, repository: str, digest: str, **fields: Any) -> Misbehaviour:
    """Every subject has this manifest as its referrer, whatever that says about its own subject."""
    media_type, content = registry.repositories[repository].manifests[digest]
    about = {"mediaType": media_type, "digest": digest_of(content), "size": len(content), **fields}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [about]}
    return answers(REFERRERS, json.dumps(index).encode(), headers={"Content-Type": INDEX})
