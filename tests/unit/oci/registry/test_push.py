# SPDX-License-Identifier: Apache-2.0
"""What comes of a push when a registry misbehaves: an image that is whole, or an error that says so, in time.

Each row of the table is one misbehaviour.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from oci import transfer
from oci.registry.access import Access
from oci.registry.repository import Repository
from rekindle.config import RegistrySettings
from rekindle.errors import CredentialsError, IntegrityError, RegistryError
from tests.samples.registry import (
    SETTINGS,
    WRONG,
    Case,
    Make,
    Sample,
    access_to,
    expecting,
    make_sample,
    named,
    parametrize,
    push,
    said,
    times_asked,
    within,
)
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import Auth
from tests.servers.registry.misbehaviour import ANYTHING, MOUNT, On, blob, manifest, upload
from tests.servers.registry.simulator import Misbehave, Registry, _Repository
from tests.servers.registry.wire import Kind, Request

pytestmark = pytest.mark.usefixtures("small_stretches")

DIGEST_INVALID = b'{"errors": [{"code": "DIGEST_INVALID", "message": "the test said so"}]}'


def upload_elsewhere(request: Request) -> bool:
    return request.elsewhere and request.kind is Kind.UPLOAD


def location(form: str) -> Make:
    return lambda _: [wrong.upload_location(form)]


PUSHES = [
    Case(name="nothing is wrong"),
    Case(name="a token", auth=Auth.TOKEN, look=times_asked(2, Kind.TOKEN)),
    Case(name="a password", auth=Auth.BASIC),
    *(
        Case(name=f"Location {form}", make=location(form), auth=auth)
        for form, auth in (("relative", Auth.TOKEN), ("absolute", Auth.TOKEN), ("query", Auth.BASIC))
    ),
    Case(
        name="Location elsewhere",
        make=location("elsewhere"),
        auth=Auth.TOKEN,
        look=lambda r, s: assert_elsewhere(r),
    ),
    Case(
        name="Location of a file",
        make=lambda _: [
            wrong.answers(upload(None, "POST"), code=202, headers={"Location": "file:///etc/passwd"})
        ],
        error=RegistryError,
        word="leads nowhere",
        seconds=1,
    ),
    Case(
        name="Location missing",
        make=lambda _: [wrong.header(upload(None, "POST"), "Location", None)],
        error=RegistryError,
        word="Location",
        seconds=1,
    ),
    Case(name="PUT 500 once", make=lambda s: [wrong.status(500, on=upload(s.big.digest), times=1)]),
    Case(
        name="PUT 500 once, early",
        make=lambda s: [wrong.status(500, on=upload(s.big.digest), early=True, times=1)],
    ),
    Case(
        name="PUT 500 for ever",
        make=lambda s: [wrong.status(500, on=upload(s.big.digest))],
        error=RegistryError,
        word="500",
        look=lambda r, s: assert_uploads(r, s, 3),
    ),
    Case(
        name="PUT 413, early",
        make=lambda s: [wrong.status(413, on=upload(s.big.digest), early=True)],
        error=RegistryError,
        word="413",
        look=lambda r, s: assert_uploads(r, s, 1),
        seconds=1,
    ),
    Case(
        name="PUT 429",
        make=lambda s: [wrong.status(429, on=upload(s.big.digest), retry_after=1, times=1)],
        look=lambda r, s: assert_upload_pause(r, s, 1.0),
    ),
    Case(
        name="PUT 429 for ages",
        make=lambda s: [wrong.status(429, on=upload(s.big.digest), retry_after=999)],
        error=RegistryError,
        word="retry after",
        seconds=1,
    ),
    Case(name="PUT 404 once", make=lambda s: [wrong.status(404, on=upload(s.big.digest), times=1)]),
    Case(
        name="PUT 403",
        make=lambda s: [wrong.status(403, on=upload(s.big.digest))],
        error=CredentialsError,
        word="does not allow",
        look=lambda r, s: assert_uploads(r, s, 1),
        seconds=1,
    ),
    Case(name="PUT done, and 500", make=lambda _: [wrong.fails_after(upload(), times=2)]),
    Case(
        name="PUT resets once",
        make=lambda s: [wrong.resets(upload(s.big.digest), after_bytes=9000, times=1)],
    ),
    Case(
        name="PUT resets for ever",
        make=lambda s: [wrong.resets(upload(s.big.digest), after_bytes=9000)],
        error=RegistryError,
        word="cannot be reached",
        look=lambda r, s: assert_uploads(r, s, 3),
    ),
    Case(
        name="PUT stalls once",
        make=lambda s: [wrong.stalls(upload(s.big.digest), after_bytes=9000, times=1)],
    ),
    Case(
        name="PUT stalls for ever",
        make=lambda s: [wrong.stalls(upload(s.big.digest), after_bytes=9000)],
        error=RegistryError,
        word="in time",
        seconds=4,
    ),
    Case(
        name="PUT of another digest",
        make=lambda s: [wrong.header(upload(s.big.digest), "Docker-Content-Digest", f"sha256:{1:064}")],
        error=IntegrityError,
        word="stored",
    ),
    Case(
        name="PUT says 400",
        make=lambda s: [wrong.answers(upload(s.big.digest), DIGEST_INVALID, code=400)],
        error=IntegrityError,
        word="got other bytes",
    ),
    Case(name="POST 503", make=lambda _: [wrong.status(503, on=upload(None, "POST"), times=2)]),
    Case(
        name="POST 403",
        make=lambda _: [wrong.status(403, on=upload(None, "POST"))],
        error=CredentialsError,
        word="does not allow",
        seconds=1,
    ),
    Case(name="HEAD 405", make=lambda _: [wrong.status(405, on=On(method="HEAD"))]),
    Case(name="HEAD 404", make=lambda _: [wrong.status(404, on=On(method="HEAD"))]),
    Case(
        name="HEAD of another size",
        make=lambda s: [wrong.too_few_bytes(s.big.digest, method="HEAD")],
        look=lambda r, s: assert_uploads(r, s, 1),
    ),
    Case(
        name="tokens that expire midway",
        # With 3, nine requests of the other threads could use up three tokens in a row before one thread's.
        make=lambda _: [wrong.tokens_expire(after=4)],
        auth=Auth.TOKEN,
    ),
    Case(
        name="a wrong password",
        auth=Auth.BASIC,
        credentials=WRONG,
        error=CredentialsError,
        word="refuses the password",
        look=lambda r, s: assert_requests(r, 2),
        seconds=0.5,
    ),
    Case(
        name="a wrong password for a token",
        auth=Auth.TOKEN,
        credentials=WRONG,
        error=CredentialsError,
        word="docker login",
        look=lambda r, s: assert_requests(r, 2),
        seconds=0.5,
    ),
    Case(
        name="may read alone",
        auth=Auth.TOKEN,
        credentials=None,
        options={"anonymous_pull": True},
        error=CredentialsError,
        word="docker login",
        seconds=1,
        look=times_asked(2, Kind.TOKEN),
    ),
    Case(name="manifest 500 once", make=lambda _: [wrong.status(500, on=manifest("1", "PUT"), times=1)]),
    Case(
        name="manifest refused",
        make=lambda _: [wrong.status(400, on=manifest("1", "PUT"))],
        error=RegistryError,
        word="400",
    ),
    Case(
        name="manifest of another digest",
        make=lambda _: [
            wrong.header(manifest("1", "PUT"), "Docker-Content-Digest", f"sha256:{1:064}", times=1)
        ],
        error=IntegrityError,
        word="stored",
    ),
    Case(name="hangs up after each answer", make=lambda _: [wrong.hangs_up(ANYTHING)]),
    Case(name="restarts midway", make=lambda s: [wrong.restarts(upload(s.big.digest), 0.2, times=1)]),
]


def assert_elsewhere(registry: Registry) -> None:
    there = [r for r in registry.requests if upload_elsewhere(r)]
    assert there
    assert not any("authorization" in r.headers for r in there)


def assert_uploads(registry: Registry, sample: Sample, count: int) -> None:
    assert len(registry.uploads(sample.big.digest)) == count


def assert_requests(registry: Registry, count: int) -> None:
    assert len(registry.requests) == count, [str(r) for r in registry.requests]


def assert_upload_pause(registry: Registry, sample: Sample, seconds: float) -> None:
    first, second = registry.uploads(sample.big.digest)
    assert second.started - first.started >= seconds


@parametrize(PUSHES)
def test_a_push(case: Case, sample: Sample) -> None:
    with Registry(auth=case.auth, misbehave=case.make(sample), **case.options) as registry:
        reference = f"{registry.host}/a/b:1"
        with within(case.seconds), expecting(case.error) as raised:
            push(sample, reference, access_to(credentials=case.credentials))
        registry.settle()  # the other blobs may be on their way still when one has failed
        case.look(registry, sample)
        assert registry.leaks == []
        if raised is None:
            assert_pushed(registry, sample)
            return
        assert case.word in said(raised.value), said(raised.value)
        there = registry.repositories.get("a/b", _Repository())
        assert case.name == "manifest of another digest" or not there.tags
        # When the registry behaves again, another try brings what is missing, and nothing else.
        registry.behave()
        had, before = set(there.blobs), len(registry.requests)
        access = access_to()
        push(sample, reference, access)
        assert_pushed(registry, sample)
        put = {r.reference for r in registry.requests[before:] if r.kind is Kind.UPLOAD and r.method == "PUT"}
        assert put == {b.digest for b in sample.blobs.values()} - had
        assert access.tally.sent_bytes == sum(b.size for b in sample.blobs.values() if b.digest not in had)


def assert_pushed(registry: Registry, sample: Sample) -> None:
    there = registry.repositories["a/b"]
    assert there.tags == {"1": sample.root.digest}
    assert {d: bytes(content) for d, content in there.blobs.items()} == {
        b.digest: sample.content(b) for b in sample.blobs.values()
    }
    puts = [r.reference for r in registry.requests if r.method == "PUT" and r.status == 201]
    assert puts[-1] == "1"
    assert set(puts[: puts.index(sample.manifest.digest)]) == set(there.blobs)


def test_what_is_there_is_mounted_or_left(sample: Sample) -> None:
    with Registry(auth=Auth.TOKEN) as registry:
        sample.serve(registry, "from/here")
        access = access_to()
        push(sample, f"{registry.host}/a/b:1", access, mount_from=["not/here", "from/here"])
        assert_pushed_quietly(registry, sample)
        assert access.tally.reused_bytes == access.tally.expected_bytes
        before = len(registry.requests)
        push(sample, f"{registry.host}/a/b:2", access_to())
        assert {r.method for r in registry.requests[before:]} <= {"HEAD", "GET", "PUT"}
        assert not [r for r in registry.requests[before:] if r.kind is Kind.UPLOAD]


@pytest.mark.parametrize(
    "misbehaviour",
    [
        lambda: wrong.ignores_mounts(),
        lambda: wrong.status(405, on=MOUNT),
        lambda: wrong.status(403, on=MOUNT),
        lambda: wrong.status(500, on=MOUNT),
        lambda: wrong.answers(MOUNT, code=202, headers={"Location": "ftp://x/"}),
    ],
)
def test_without_mounts_blobs_are_sent(misbehaviour: Callable[[], Misbehave], sample: Sample) -> None:
    with Registry(misbehave=[misbehaviour()]) as registry:
        sample.serve(registry, "from/here")
        push(sample, f"{registry.host}/a/b:1", access_to(), mount_from=["from/here"])
        assert_pushed(registry, sample)
        assert not registry.repositories["a/b"].sessions


def assert_pushed_quietly(registry: Registry, sample: Sample) -> None:
    assert registry.repositories["a/b"].tags == {"1": sample.root.digest}
    assert not [r for r in registry.uploads() if r.method == "PUT"]


def test_a_damaged_blob_is_not_pushed(tmp_path: Path) -> None:
    sample = make_sample(tmp_path)
    path = tmp_path / "blobs" / "sha256" / sample.big.digest.hex
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with Registry() as registry:
        with pytest.raises(IntegrityError, match="does not match its digest"):
            push(sample, f"{registry.host}/a/b:1", access_to())
        registry.settle()
        there = registry.repositories["a/b"]
        assert sample.big.digest not in there.blobs
        assert not there.tags
        assert len(registry.uploads(sample.big.digest)) == 1


@pytest.mark.parametrize(
    ("misbehaviour", "message"),
    [
        (lambda: wrong.status(413, on=wrong.upload()), "takes no upload"),
        (lambda: wrong.resets(wrong.upload()), "reached"),
    ],
)
def test_a_proxy_that_takes_no_large_uploads_is_suspected(
    misbehaviour: Callable[[], Misbehave], message: str, sample: Sample
) -> None:
    with Registry(misbehave=[misbehaviour()]) as registry:
        with pytest.raises(RegistryError, match=message) as caught:
            push(sample, f"{registry.host}/a/b:1", access_to())
        assert "client_max_body_size" in caught.value.hint


def test_from_one_registry_to_another(sample: Sample) -> None:
    with Registry() as source, Registry() as mirror, Registry(auth=Auth.TOKEN) as target:
        sample.serve(source)
        sample.serve(mirror, tag=None)
        mirror.misbehave(wrong.wrong_bytes(sample.big.digest))
        access = access_to(f"http://{mirror.host}")
        with Repository(named(f"{source.host}/a/b:1"), access) as repository:
            tree = transfer.explore(repository, repository.resolve(), access.config.limits)
            transfer.into_registry(repository, tree, named(f"{target.host}/a/b:1"), access)
        assert_pushed(target, sample)
        assert access.tally.reused_blobs == 0
        assert access.tally.blobs == len(sample.blobs)
        assert {r.method for r in mirror.requests} == {"GET"}  # nothing is ever pushed there


def test_a_source_that_fails_is_not_asked_by_way_of_the_target(sample: Sample) -> None:
    failure = wrong.status(500, on=blob(sample.big.digest))
    with Registry(misbehave=[failure]) as source, Registry() as target:
        sample.serve(source)
        access = access_to()
        with Repository(named(f"{source.host}/a/b:1"), access) as repository:
            tree = transfer.explore(repository, repository.resolve(), access.config.limits)
            with within(3), pytest.raises(RegistryError, match="fails"):
                transfer.into_registry(repository, tree, named(f"{target.host}/a/b:1"), access)
        assert len(source.downloads(sample.big.digest)) == SETTINGS.retry.attempts
        assert not target.repositories["a/b"].tags


# In chunks.


def in_chunks(host: str, chunk_bytes: int) -> Access:
    access = access_to()
    settings = {host: RegistrySettings(chunk_bytes=chunk_bytes)}
    return structs.replace(access, config=structs.replace(access.config, registries=settings))


@pytest.mark.parametrize("auth", [Auth.NONE, Auth.TOKEN])
@pytest.mark.parametrize("chunk_bytes", [1000, 100_000, 1 << 30])
def test_no_request_has_more_than_a_chunk(auth: Auth, chunk_bytes: int, sample: Sample) -> None:
    with Registry(auth=auth) as registry:
        access = in_chunks(registry.host, chunk_bytes)
        push(sample, f"{registry.host}/a/b:1", access)
        assert_pushed(registry, sample)
        assert access.tally.sent_bytes == access.tally.expected_bytes
        sent = [request.body_bytes for request in registry.requests if request.method == "PATCH"]
        count = -(-sample.big.size // chunk_bytes) if chunk_bytes < sample.big.size else 0
        assert len(sent) == count
        assert all(size <= chunk_bytes for size in sent)
        assert sum(sent) == (sample.big.size if count else 0)


def test_an_upload_in_chunks_that_broke_begins_anew(sample: Sample) -> None:
    with Registry(misbehave=[wrong.status(500, on=upload(None, "PATCH"), times=1)]) as registry:
        push(sample, f"{registry.host}/a/b:1", in_chunks(registry.host, 100_000))
        assert_pushed(registry, sample)
