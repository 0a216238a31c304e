# SPDX-License-Identifier: Apache-2.0
"""What comes of a pull when a registry misbehaves: right bytes, or an error that says so, in time.

Each row of the table is one misbehaviour.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from oci import media_types
from oci.layout import Layout
from oci.registry import download
from rekindle.errors import (
    CredentialsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RegistryError,
)
from tests.samples.registry import (
    CALM,
    STRETCH,
    WRONG,
    Case,
    Make,
    Sample,
    access_to,
    assert_all_there,
    assert_nothing_to_see,
    blobs_below,
    expecting,
    parametrize,
    pull,
    said,
    sent,
    times_asked,
    within,
)
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import PASSWORD, Auth
from tests.servers.registry.misbehaviour import ANYTHING, TOKEN, blob, manifest
from tests.servers.registry.simulator import Misbehave, Registry
from tests.servers.registry.wire import Answer, Kind

pytestmark = pytest.mark.usefixtures("small_stretches")


def each_byte_once(registry: Registry, sample: Sample) -> None:
    assert sent(registry, sample) == sample.big.size


def at_most(factor: float) -> Callable[[Registry, Sample], None]:
    def look(registry: Registry, sample: Sample) -> None:
        assert sent(registry, sample) <= factor * sample.big.size

    return look


def shifted(asked: range) -> range:
    return range(asked.start - 1, asked.stop - 1)


def junk(content: bytes) -> Make:
    """The tag names this; unlike `other_manifest`, with a Docker-Content-Digest that is right."""

    def make(_: Sample) -> list[Misbehave]:
        headers = {"Content-Type": media_types.MANIFEST}
        return [wrong.answers(manifest("1"), content, headers=headers)]

    return make


def another_scope(value: str) -> Misbehave:
    """Challenges that are none."""

    def act(*_: object) -> Answer:
        return Answer(status=401, headers={"WWW-Authenticate": value})

    return wrong.Misbehaviour(on=manifest(), act=act)


def redirect(to: str) -> Make:
    return lambda _: [wrong.redirects(blob(), to=to)]


def challenge(value: str) -> Make:
    return lambda _: [another_scope(value)]


def token(content: bytes) -> Make:
    return lambda _: [wrong.answers(TOKEN, content)]


PULLS = [
    Case(name="nothing is wrong", look=each_byte_once),
    # Content.
    Case(
        name="wrong bytes",
        make=lambda s: [wrong.wrong_bytes(s.big.digest)],
        error=IntegrityError,
        word="does not match its digest",
    ),
    Case(
        name="wrong bytes, first",
        make=lambda s: [wrong.wrong_bytes(s.big.digest, at=0)],
        error=IntegrityError,
        word="does not match its digest",
    ),
    Case(
        name="wrong bytes, small",
        make=lambda s: [wrong.wrong_bytes(s.small.digest)],
        error=IntegrityError,
        word="does not match its digest",
    ),
    Case(
        name="too many bytes",
        make=lambda s: [wrong.too_many_bytes(s.big.digest)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="too many bytes, small",
        make=lambda s: [wrong.too_many_bytes(s.small.digest)],
        error=RegistryError,
        word="should have 1000",
    ),
    Case(
        name="too many bytes in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.too_many_bytes(s.small.digest)],
        error=IntegrityError,
        word="longer",
    ),
    Case(
        name="too many bytes in chunks, no ranges",
        make=lambda s: [wrong.chunked(blob()), wrong.ignores_range(), wrong.too_many_bytes(s.big.digest)],
    ),  # what was to come has come by then, and is right
    Case(
        name="too few bytes",
        make=lambda s: [wrong.too_few_bytes(s.big.digest)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="too few bytes, small",
        make=lambda s: [wrong.too_few_bytes(s.small.digest)],
        error=RegistryError,
        word="should have 1000",
    ),
    Case(
        name="too few bytes in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.too_few_bytes(s.small.digest)],
        error=RegistryError,
        word="416",
    ),
    Case(name="in chunks", make=lambda _: [wrong.chunked(ANYTHING)], look=each_byte_once),
    Case(name="gzip", make=lambda _: [wrong.gzipped(blob())], error=RegistryError, word="encoded as gzip"),
    Case(
        name="another manifest under a digest",
        make=lambda s: [wrong.other_manifest(s.manifest.digest, s.content(s.manifest) + b" ")],
        error=IntegrityError,
        word="other bytes",
    ),
    Case(
        name="another manifest under the digest asked for",
        make=lambda s: [wrong.other_manifest(s.root.digest, b"{}")],
        reference="a/b@ROOT",
        error=IntegrityError,
        word="another manifest",
    ),
    Case(
        name="a manifest that is not that of its header",
        make=lambda _: [wrong.other_manifest("1", b"{}")],
        error=IntegrityError,
        word="another manifest",
    ),
    Case(name="a manifest that is no JSON", make=junk(b"\0nonsense"), error=FormatError, word="not JSON"),
    Case(name="a manifest that is a list", make=junk(b"[]"), error=FormatError, word="object"),
    Case(name="a manifest nested deeply", make=junk(b"[" * 100_000), error=FormatError, word="not JSON"),
    Case(
        name="a manifest of another type",
        make=junk(json.dumps({"mediaType": media_types.INDEX}).encode()),
        error=FormatError,
        word="something else",
    ),
    Case(
        name="a page for people",
        make=lambda _: [
            wrong.answers(manifest("1"), b"<html>sign in</html>", headers={"Content-Type": "text/html"})
        ],
        error=FormatError,
        word="not JSON",
    ),
    Case(
        name="a manifest of no type",
        make=lambda _: [wrong.answers(manifest("1"), b"{}", headers={"Content-Type": "text/plain"})],
        error=FormatError,
        word="not an image",
    ),
    Case(
        name="a huge manifest",
        make=junk(bytes(5 << 20)),
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a huge manifest in chunks",
        make=lambda s: [wrong.chunked(manifest()), *junk(bytes(5 << 20))(s)],
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a manifest below that is longer than said",
        make=lambda s: [wrong.other_manifest(s.manifest.digest, bytes(1 << 20))],
        error=RegistryError,
        word="more than",
    ),
    Case(
        name="a huge header",
        make=lambda _: [wrong.header(manifest(), "X-Huge", "x" * 70_000)],
        error=RegistryError,
        word="cannot be reached",
    ),
    Case(
        name="a huge header of a blob",
        make=lambda s: [wrong.header(blob(s.big.digest), "X-Huge", "x" * 70_000, times=1)],
    ),
    Case(
        name="the tag moves",
        make=lambda _: [wrong.tag_moves("1", f"sha256:{0:064}", method="GET")],
    ),
    # Statuses.
    Case(
        name="403 for the manifest",
        make=lambda _: [wrong.status(403, on=manifest())],
        error=CredentialsError,
        word="does not allow",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="403 for a blob",
        make=lambda s: [wrong.status(403, on=blob(s.big.digest))],
        error=CredentialsError,
        word="does not allow",
        seconds=1,
    ),
    Case(
        name="404 for the manifest",
        make=lambda _: [wrong.status(404, on=manifest())],
        error=NotFoundError,
        word="NAME_UNKNOWN",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="404 for a blob",
        make=lambda s: [wrong.status(404, on=blob(s.small.digest))],
        error=NotFoundError,
        word="does not have what was asked for",
        seconds=1,
    ),
    Case(name="500 twice", make=lambda _: [wrong.status(500, on=blob(), times=2)]),
    Case(
        name="502 with a page",
        make=lambda _: [wrong.answers(manifest(), b"<html>bad gateway</html>", code=502)],
        error=RegistryError,
        word="502",
        look=times_asked(3, Kind.MANIFEST),
    ),
    Case(
        name="500 for ever",
        make=lambda s: [wrong.status(500, on=blob(s.small.digest))],
        error=RegistryError,
        word="500",
    ),
    Case(name="418", make=lambda _: [wrong.status(418, on=manifest())], error=RegistryError, word="418"),
    Case(name="429", make=lambda _: [wrong.status(429, on=ANYTHING, times=2)]),
    Case(
        name="429 with seconds",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after=1, times=1)],
        look=lambda r, _: assert_pause(r, 1.0),
    ),
    Case(
        name="503 with a date",
        make=lambda _: [wrong.status(503, on=manifest(), retry_after=wrong.http_date(2), times=1)],
        seconds=4,
        look=lambda r, _: assert_pause(r, 0.5),
    ),
    Case(
        name="503 with a date that has passed",
        make=lambda _: [wrong.status(503, on=manifest(), retry_after=wrong.http_date(-60), times=1)],
        seconds=1,
    ),
    Case(
        name="429 that asks for an hour",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after=3600)],
        error=RegistryError,
        word="asks clients to retry after 3600 s",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="429 that asks for ages",
        make=lambda _: [wrong.status(429, on=blob(), retry_after="9" * 5000)],
        error=RegistryError,
        word="retry after",
        seconds=1,
    ),
    Case(
        name="429 that asks for nonsense",
        make=lambda _: [wrong.status(429, on=manifest(), retry_after="soon", times=1)],
        seconds=1,
    ),
    Case(
        name="429 of the storage",
        make=lambda _: [
            wrong.redirects(blob()),
            wrong.status(429, on=blob(elsewhere=True), retry_after=1, times=1),
        ],
    ),
    # Redirects.
    Case(
        name="redirects to another host",
        make=lambda _: [wrong.redirects(blob())],
        auth=Auth.TOKEN,
        look=each_byte_once,
    ),
    Case(name="302, and a password", make=lambda _: [wrong.redirects(blob(), 302)], auth=Auth.BASIC),
    Case(name="redirects of manifests", make=lambda _: [wrong.redirects(manifest())], auth=Auth.BASIC),
    Case(name="links that expire at once", make=lambda _: [wrong.redirects(blob(), expired=2)]),
    Case(
        name="links that expire midway",
        make=lambda s: [
            wrong.redirects(blob()),
            wrong.status(403, on=blob(s.big.digest, elsewhere=True), skip=3, times=2),
        ],
        auth=Auth.TOKEN,
    ),
    Case(
        name="links that never work",
        make=lambda _: [wrong.redirects(blob(), expired=10**6)],
        error=RegistryError,
        word="403",
    ),
    Case(
        name="a redirect loop",
        make=lambda s: [wrong.redirects(blob(s.big.digest), to="")],
        error=RegistryError,
        word="more than 5",
        seconds=1,
    ),
    *(
        Case(
            name=f"a redirect to {where}",
            make=redirect(where),
            error=RegistryError,
            word="leads nowhere",
            seconds=1,
        )
        for where in (
            "file:///etc/passwd",
            "ftp://127.0.0.1/x",
            "http://user:word@127.0.0.1/",
            "http://a..b/",
            "http://[::1/",
            "http://127.0.0.1:99999/",
            f"http://{'a' * 64}.example/",
        )
    ),
    Case(
        name="a redirect to nobody",
        make=redirect("http://127.0.0.1:1/"),
        error=RegistryError,
        word="refused",
    ),
    Case(
        name="a redirect without Location",
        make=lambda _: [wrong.answers(blob(), code=307)],
        error=RegistryError,
        word="Location",
        seconds=1,
    ),
    # Ranges.
    Case(name="no ranges", make=lambda _: [wrong.ignores_range()], look=at_most(3)),
    Case(
        name="no ranges, in chunks",
        make=lambda _: [wrong.chunked(blob()), wrong.ignores_range()],
        look=at_most(3),
    ),
    Case(
        name="no ranges after some",
        make=lambda s: [wrong.ignores_range(blob(s.big.digest), skip=3)],
    ),
    Case(
        name="no ranges, and it breaks",
        make=lambda s: [
            wrong.ignores_range(),
            wrong.closes(blob(s.big.digest), after_bytes=5 * STRETCH, skip=1, times=2),
        ],
    ),
    Case(
        name="no ranges, and a small blob breaks",
        make=lambda s: [wrong.ignores_range(), wrong.closes(blob(s.small.digest), after_bytes=500, times=1)],
    ),
    Case(
        name="no ranges, wrong bytes",
        make=lambda s: [wrong.ignores_range(), wrong.wrong_bytes(s.big.digest)],
        error=IntegrityError,
        word="digest",
    ),
    Case(
        name="no ranges, 404 after all",
        make=lambda s: [
            wrong.status(404, on=blob(s.big.digest), skip=1),
            wrong.ignores_range(),
        ],
        error=NotFoundError,
        word="does not have what was asked for",
    ),
    Case(
        name="another range",
        make=lambda s: [wrong.another_range(blob(s.big.digest), shifted, lie=False, skip=2)],
        error=RegistryError,
        word="it sends",
    ),
    Case(
        name="another range, and a lie",
        make=lambda s: [wrong.another_range(blob(s.big.digest), shifted, lie=True, skip=2)],
        error=IntegrityError,
        word="digest",
    ),
    Case(
        name="Content-Range without a size",
        make=lambda _: [wrong.Misbehaviour(on=blob(), act=lambda q, go: any_size(go(q)))],
    ),
    Case(
        name="Content-Range missing",
        make=lambda _: [wrong.header(blob(), "Content-Range", None)],
        error=RegistryError,
        word="it sends",
    ),
    # Connections.
    Case(
        name="stalls before the headers",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=-1, times=1)],
    ),
    Case(name="stalls after the headers", make=lambda s: [wrong.stalls(blob(s.big.digest), times=1)]),
    Case(
        name="stalls in the body",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=20_000, times=2)],
        look=at_most(1),
    ),
    Case(
        name="stalls for ever",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=100)],
        error=RegistryError,
        word="stalls",
        seconds=4,
    ),
    Case(
        name="stalls before the headers for ever",
        make=lambda s: [wrong.stalls(blob(s.big.digest), after_bytes=-1)],
        error=RegistryError,
        word="in time",
        seconds=4,
    ),
    Case(
        name="stalls at once",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=-1)],
        error=RegistryError,
        word="in time",
        seconds=1,
    ),
    Case(
        name="stalls in the manifest",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=5, times=1)],
    ),
    Case(
        name="stalls in the manifest for ever",
        make=lambda _: [wrong.stalls(manifest(), after_bytes=5)],
        error=RegistryError,
        word="stalls",
    ),
    Case(name="drips", make=lambda s: [wrong.slow(blob(s.big.digest), 10, times=1)], seconds=3),
    Case(
        name="drips for ever",
        make=lambda s: [wrong.slow(blob(s.small.digest), 50)],
        error=RegistryError,
        word="stalls",
        seconds=4,
    ),
    Case(
        name="drips in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.slow(blob(s.big.digest), 10, times=1)],
        seconds=3,
    ),
    Case(
        name="breaks and breaks",
        make=lambda s: [wrong.closes(blob(s.big.digest), after_bytes=STRETCH // 2, times=12)],
        seconds=5,
        look=each_byte_once,
    ),
    Case(
        name="breaks in a small blob",
        make=lambda s: [wrong.closes(blob(s.small.digest), after_bytes=400, times=2)],
        look=lambda r, s: assert_ranges(r, s.small.digest, [None, "bytes=400-999", "bytes=800-999"]),
    ),
    Case(
        name="resets",
        make=lambda s: [wrong.resets(blob(s.big.digest), after_bytes=STRETCH // 2, times=4)],
        seconds=5,
    ),
    Case(
        name="resets for ever",
        make=lambda s: [wrong.resets(blob(s.small.digest), after_bytes=0)],
        error=RegistryError,
        word="3 times in a row",
    ),
    Case(
        name="breaks in chunks",
        make=lambda s: [wrong.chunked(blob()), wrong.closes(blob(s.big.digest), after_bytes=9000, times=2)],
    ),
    Case(name="hangs up after each answer", make=lambda _: [wrong.hangs_up(ANYTHING)]),
    Case(
        name="says close",
        make=lambda _: [wrong.header(ANYTHING, "Connection", "close")],
    ),
    Case(
        name="says close, and stalls",
        make=lambda s: [
            wrong.header(ANYTHING, "Connection", "close"),
            wrong.stalls(blob(s.big.digest), after_bytes=100, times=1),
        ],
    ),
    Case(
        name="announces more than it sends",
        make=lambda s: [wrong.content_length(blob(s.small.digest), 5)],
        error=RegistryError,
        word="should have",
    ),
    Case(name="restarts midway", make=lambda s: [wrong.restarts(blob(s.big.digest), 0.2, skip=3, times=1)]),
    Case(
        name="a straggler",
        make=lambda s: [wrong.slow(blob(s.big.digest), STRETCH / 20, skip=6, times=1)],
        settings=CALM,
        straggler_seconds=0.3,
        seconds=3,  # the straggler would take 20
    ),
    # Who we are.
    Case(name="a token", auth=Auth.TOKEN, look=times_asked(1, Kind.TOKEN)),
    Case(name="a password", auth=Auth.BASIC),
    Case(
        name="nobody's token",
        auth=Auth.TOKEN,
        credentials=None,
        options={"anonymous_pull": True},
    ),
    Case(
        name="tokens that expire midway",
        make=lambda _: [wrong.tokens_expire(after=4)],
        auth=Auth.TOKEN,
        look=each_byte_once,
    ),
    Case(name="tokens for a second", auth=Auth.TOKEN, options={"token_seconds": 1}),
    Case(
        name="no password",
        auth=Auth.BASIC,
        credentials=None,
        error=CredentialsError,
        word="docker login",
        seconds=0.5,
        look=times_asked(1, Kind.MANIFEST),
    ),
    Case(
        name="a wrong password",
        auth=Auth.BASIC,
        credentials=WRONG,
        error=CredentialsError,
        word="refuses the password",
        seconds=0.5,
        look=times_asked(2, Kind.MANIFEST),
    ),
    Case(
        name="a wrong password for a token",
        auth=Auth.TOKEN,
        credentials=WRONG,
        error=CredentialsError,
        word="docker login",
        seconds=0.5,
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="no token for nobody",
        auth=Auth.TOKEN,
        credentials=None,
        error=CredentialsError,
        word="has no credentials",
        seconds=0.5,
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="401 whatever we bring",
        make=lambda _: [wrong.unauthorized()],
        auth=Auth.TOKEN,
        error=CredentialsError,
        word="tokens",
        seconds=1,
        look=times_asked(4, Kind.TOKEN),
    ),
    *(
        Case(
            name=f"401 with a challenge, {name}",
            make=challenge(value),
            error=error,
            word=word,
            seconds=1,
            look=times_asked(2, Kind.MANIFEST),
        )
        for name, value, error, word in (
            ("unknown", "Negotiate", CredentialsError, "does not support"),
            ("empty", "", CredentialsError, "does not support"),
            ("without a realm", "Bearer", RegistryError, "realm"),
            ("with a realm that is none", 'Bearer realm="file:///etc/passwd"', RegistryError, "realm"),
            ("elsewhere in plain text", 'Bearer realm="http://192.0.2.1/t"', RegistryError, "without TLS"),
            ("long", "a" * 60_000, CredentialsError, "does not support"),
        )
    ),
    Case(
        name="a token endpoint that refuses",
        make=lambda _: [wrong.status(403, on=TOKEN)],
        auth=Auth.TOKEN,
        error=CredentialsError,
        word="403",
        look=times_asked(1, Kind.TOKEN),
    ),
    Case(
        name="a token endpoint that fails once",
        make=lambda _: [wrong.status(503, on=TOKEN, times=1)],
        auth=Auth.TOKEN,
    ),
    Case(
        name="a token endpoint that fails",
        make=lambda _: [wrong.status(503, on=TOKEN)],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="503",
        look=times_asked(3, Kind.TOKEN),
    ),
    Case(
        name="a token endpoint that redirects",
        make=lambda _: [wrong.answers(TOKEN, code=302, headers={"Location": "http://192.0.2.1/"})],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="302",
    ),
    *(
        Case(
            name=f"a token that is {name}",
            make=token(content),
            auth=Auth.TOKEN,
            error=RegistryError,
            word=word,
            seconds=1,
        )
        for name, content, word in (
            ("rubbish", b"rubbish", "no token"),
            ("missing", b"{}", "no token"),
            ("a number", b'{"token": 1}', "no token"),
            ("a header", b'{"token": "a\\r\\nX-Evil: 1"}', "no token"),
            ("huge", bytes(2 << 20), "more than"),
            ("good for ever so long", b'{"token": "a", "expires_in": 1e400}', "no token"),
        )
    ),
    Case(
        name="a token endpoint that stalls",
        make=lambda _: [wrong.stalls(TOKEN, after_bytes=3)],
        auth=Auth.TOKEN,
        error=RegistryError,
        word="stalls",
    ),
    Case(
        name="a token endpoint that is down",
        auth=Auth.TOKEN,
        options={"realm": "http://127.0.0.1:1/token"},
        error=RegistryError,
        word="refused",
        seconds=1,
    ),
]


def any_size(answer: Answer) -> Answer:
    if "Content-Range" in answer.headers:
        answer.headers["Content-Range"] = answer.headers["Content-Range"].partition("/")[0] + "/*"
    return answer


def assert_pause(registry: Registry, seconds: float) -> None:
    first, second = registry.asked("GET", Kind.MANIFEST)[:2]
    assert second.started - first.started >= seconds


def assert_ranges(registry: Registry, digest: str, ranges: list[str | None]) -> None:
    assert [r.headers.get("range") for r in registry.downloads(digest)] == ranges


@parametrize(PULLS)
def test_a_pull(case: Case, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "_STRAGGLER_SECONDS", case.straggler_seconds)
    target = Layout.create(tmp_path / "target")
    with Registry(auth=case.auth, misbehave=case.make(sample), **case.options) as registry:
        sample.serve(registry)
        reference = f"{registry.host}/{case.reference.replace('ROOT', sample.root.digest)}"
        access = access_to(credentials=case.credentials, settings=case.settings)
        with within(case.seconds), expecting(case.error) as raised:
            pull(reference, target, access)
        case.look(registry, sample)
        assert registry.leaks == []
        if raised is None:
            assert_all_there(target, sample.root, sample)
            return
        assert case.word in said(raised.value), said(raised.value)
        assert PASSWORD not in said(raised.value)
        assert_nothing_to_see(target)
        there = blobs_below(target)
        again(registry, sample, reference, target, there)


def again(registry: Registry, sample: Sample, reference: str, target: Layout, there: set[str]) -> None:
    """When the registry behaves again, another try brings what is missing, and nothing else."""
    registry.behave()
    registry.realm = f"http://{registry.host}/token"
    sample.serve(registry)
    before = len(registry.requests)
    access = access_to()
    pull(reference, target, access)
    assert_all_there(target, sample.root, sample)
    asked = {
        r.reference for r in registry.requests[before:] if r.kind is Kind.BLOB and r.status in {200, 206}
    }
    assert asked == {b.digest for b in sample.blobs.values() if b.size} - there
    missing = [b for b in sample.blobs.values() if b.digest not in there]
    assert access.tally.fetched_bytes == sum(b.size for b in missing)
    assert access.tally.reused_blobs == len(sample.blobs) - len(missing)
