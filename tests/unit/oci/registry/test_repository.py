# SPDX-License-Identifier: Apache-2.0
"""A repository at close range: who refers to an image, who can be reached, and how transfers are ended."""

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from oci import cosign_tags, media_types, transfer
from oci.layout import Layout
from oci.registry import download, settle
from oci.registry.repository import Repository
from rekindle.config import RetryPolicy, TransferSettings
from rekindle.digest import Digest
from rekindle.errors import FormatError, RegistryError, RekindleError, UsageError
from tests.conftest import free_port
from tests.samples.registry import (
    CALM,
    STRETCH,
    Sample,
    access_to,
    assert_all_there,
    named,
    pull,
    push,
    within,
)
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.misbehaviour import ANYTHING, REFERRERS, blob, upload
from tests.servers.registry.simulator import Misbehave, Registry
from tests.servers.registry.wire import Answer, Ending, Request

pytestmark = pytest.mark.usefixtures("small_stretches")


# Referrers.


@pytest.fixture
def referred(sample: Sample) -> Iterator[tuple[Registry, str]]:
    """A registry with an image and what refers to it."""
    with Registry() as registry:
        sample.serve(registry)
        subject = {"mediaType": sample.root.media_type, "digest": sample.root.digest, "size": 1}
        signature = registry.add_image("a/b", None, b"signature", subject=subject, artifactType="text/x")
        about = registry.repositories["a/b"].manifests[signature]
        entry = {"mediaType": about[0], "digest": signature, "size": len(about[1])}
        index = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": [entry]}
        registry.add_manifest("a/b", index, sample.root.digest.replace(":", "-"))
        registry.requests.clear()
        yield registry, signature


def referrers(registry: Registry, sample: Sample) -> list[str]:
    with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
        return [str(each.digest) for each in repository.referrers(sample.root.digest)]


@pytest.mark.parametrize(
    "make",
    [
        list,
        lambda: [wrong.no_referrers()],
        lambda: wrong.web_page(),
        lambda: [wrong.status(code, on=REFERRERS) for code in (400,)],
        lambda: [wrong.status(401, on=REFERRERS)],
        lambda: [wrong.status(403, on=REFERRERS)],
        lambda: [wrong.status(500, on=REFERRERS)],
        lambda: [wrong.stalls(REFERRERS, after_bytes=10)],
        lambda: [wrong.answers(REFERRERS, b"<html>", headers={"Content-Type": "text/html"})],
    ],
)
def test_referrers_are_found(
    make: Callable[[], list[Misbehave]], referred: tuple[Registry, str], sample: Sample
) -> None:
    registry, signature = referred
    registry.misbehave(*make())
    with within(4):
        assert referrers(registry, sample) == [signature]
    assert not registry.asked(elsewhere=True)


def test_referrers_come_page_by_page(sample: Sample) -> None:
    with Registry(page_size=2) as registry:
        sample.serve(registry)
        subject = {"mediaType": sample.root.media_type, "digest": sample.root.digest, "size": 1}
        all_of_them = {
            registry.add_image("a/b", None, bytes([number]), subject=subject) for number in range(7)
        }
        assert set(referrers(registry, sample)) == all_of_them
        link = f'<http://{registry.host}/v2/a/b/referrers/{sample.root.digest}>; rel="next"'
        registry.misbehave(wrong.header(REFERRERS, "Link", link))  # without end
        with within(3), pytest.raises(FormatError, match="more than 1000"):
            referrers(registry, sample)


def test_no_referrers_and_no_tag_are_none(sample: Sample) -> None:
    with Registry(misbehave=[wrong.no_referrers()]) as registry:
        sample.serve(registry)
        assert referrers(registry, sample) == []


def test_that_there_are_no_referrers_is_not_said_of_a_registry_that_fails(sample: Sample) -> None:
    with Registry(misbehave=[wrong.status(503, on=REFERRERS)]) as registry:
        sample.serve(registry)
        with pytest.raises(RegistryError, match="fails"):
            referrers(registry, sample)


def test_a_tag_that_is_an_alias_of_the_subject_is_no_list(sample: Sample) -> None:
    with Registry(misbehave=[wrong.no_referrers()]) as registry:
        sample.serve(registry, tag=sample.root.digest.replace(":", "-"))
        assert referrers(registry, sample) == []


def test_referrers_that_lie_are_given_as_they_are(referred: tuple[Registry, str], sample: Sample) -> None:
    registry, _ = referred
    other = registry.add_image("a/b", None, b"of something else")
    registry.misbehave(wrong.lying_referrers(registry, "a/b", other))
    assert referrers(registry, sample) == [other]  # whoever wants to know opens each


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"manifests": 1}'])
def test_lists_of_referrers_that_are_none(content: bytes, sample: Sample) -> None:
    with Registry() as registry:
        registry.misbehave(wrong.answers(REFERRERS, content, headers={"Content-Type": media_types.INDEX}))
        sample.serve(registry)
        with pytest.raises(FormatError):
            referrers(registry, sample)


@pytest.mark.parametrize("knows", [True, False])
def test_who_refers_is_listed_by_us_where_the_registry_does_not(knows: bool, sample: Sample) -> None:
    with Registry(misbehave=[] if knows else [wrong.no_referrers()]) as registry:
        sample.serve(registry)
        registry.add_blob("a/b", b"{}")
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            found = set()
            for number in range(3):
                document = {
                    "schemaVersion": 2,
                    "mediaType": media_types.MANIFEST,
                    "artifactType": f"text/{number}",
                    "config": {"mediaType": "x/y", "digest": Digest.of_bytes(b"{}"), "size": 2},
                    "layers": [],
                    "subject": sample.root.to_json(),
                }
                content = json.dumps(document).encode()
                found.add(repository.put_manifest(content, media_types.MANIFEST))
                repository.put_manifest(content, media_types.MANIFEST)  # again, and it is there once
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            listed = repository.referrers(sample.root.digest)
        assert {each.digest for each in listed} == found
        assert sorted(each.artifact_type for each in listed) == ["text/0", "text/1", "text/2"]
        assert len(registry.repositories["a/b"].tags) == (1 if knows else 2)


ODD = [None, 5, {}, {"digest": f"sha512:{'0' * 128}", "mediaType": media_types.MANIFEST, "size": 5}]


@pytest.mark.parametrize("knows", [True, False])
def test_an_odd_entry_of_a_list_costs_that_entry_only(
    knows: bool, referred: tuple[Registry, str], sample: Sample
) -> None:
    registry, signature = referred
    there = registry.repositories["a/b"]
    tag = sample.root.digest.replace(":", "-")
    index = json.loads(there.manifests[there.tags[tag]][1])
    index["manifests"] = [*ODD, *index["manifests"]]
    content = json.dumps(index).encode()
    registry.add_manifest("a/b", content, tag, media_types.INDEX)
    registry.misbehave(
        wrong.answers(REFERRERS, content, headers={"Content-Type": media_types.INDEX})
        if knows
        else wrong.no_referrers()
    )
    assert referrers(registry, sample) == [signature]
    if not knows:
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            added = repository.put_manifest(referring(registry, sample, "x/y"), media_types.MANIFEST)
        entries = json.loads(there.manifests[there.tags[tag]][1])["manifests"]
        # What others wrote stays, as far as the registry takes it.
        assert [each["digest"] for each in entries] == [signature, added]


def referring(registry: Registry, sample: Sample, kind: str) -> bytes:
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.MANIFEST,
        "artifactType": kind,
        "config": {"mediaType": "x/y", "digest": registry.add_blob("a/b", b"{}"), "size": 2},
        "layers": [],
        "subject": sample.root.to_json(),
    }
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    "make",
    [list, lambda: [wrong.no_referrers()], lambda: [ignores_filter()]],
    ids=["filtered", "fallback tag", "not filtered"],
)
def test_a_signature_is_found_among_more_reports_than_are_listed(
    make: Callable[[], list[Misbehave]], sample: Sample
) -> None:
    with Registry(page_size=100, misbehave=make()) as registry:
        sample.serve(registry)
        listed = []
        for number in range(1200):
            kind = media_types.BUNDLE if number == 1150 else f"application/vnd.report.{number}"
            content = referring(registry, sample, kind)
            digest = registry.add_manifest("a/b", content, None, media_types.MANIFEST)
            listed.append(
                {
                    "mediaType": media_types.MANIFEST,
                    "digest": digest,
                    "size": len(content),
                    "artifactType": kind,
                }
            )
        index = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": listed}
        registry.add_manifest("a/b", index, sample.root.digest.replace(":", "-"))
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            found = repository.referrers(sample.root.digest, artifact_type=media_types.BUNDLE)
            assert [each.digest for each in found] == [listed[1150]["digest"]]
            with pytest.raises(FormatError, match="more than 1000"):
                repository.referrers(sample.root.digest)


def ignores_filter() -> Misbehave:
    def act(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
        return proceed(
            replace(request, query={k: v for k, v in request.query.items() if k != "artifactType"})
        )

    return wrong.Misbehaviour(on=REFERRERS, act=act)


def test_signatures_from_before_a_registry_had_the_api_are_found(
    referred: tuple[Registry, str], sample: Sample
) -> None:
    registry, signature = referred
    empty = json.dumps({"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": []}).encode()
    registry.misbehave(wrong.answers(REFERRERS, empty, headers={"Content-Type": media_types.INDEX}))
    with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
        found = repository.referrers(sample.root.digest, artifact_type=media_types.BUNDLE)
    assert [each.digest for each in found] == [signature]


def test_a_registry_that_lists_it_for_another_subject_does_not_list_it(sample: Sample) -> None:
    with Registry() as registry:
        sample.serve(registry)
        registry.misbehave(
            wrong.header(wrong.manifest(None, "PUT"), "OCI-Subject", f"sha256:{'0' * 64}", times=1)
        )
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            repository.put_manifest(referring(registry, sample, "x/y"), media_types.MANIFEST)
        assert sample.root.digest.replace(":", "-") in registry.repositories["a/b"].tags


def test_signers_at_the_same_time_lose_nothing(sample: Sample) -> None:
    """Each reads the index before the others write theirs."""
    barrier = threading.Barrier(5)
    tag = sample.root.digest.replace(":", "-")

    def wait_for_others(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(1)
        return proceed(request)

    together = wrong.Misbehaviour(on=wrong.manifest(tag, "PUT"), act=wait_for_others, times=5)
    with Registry(misbehave=[wrong.no_referrers(), together]) as registry:
        sample.serve(registry)
        contents = [referring(registry, sample, f"text/{number}") for number in range(5)]

        def attach(content: bytes) -> Digest:
            with Repository(named(f"{registry.host}/a/b"), access_to(settings=CALM)) as repository:
                digest = repository.put_manifest(content, media_types.MANIFEST)
                repository.settle()
                return digest

        with ThreadPoolExecutor(5) as pool:
            attached = set(pool.map(attach, contents))
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            assert {each.digest for each in repository.referrers(sample.root.digest)} == attached


def test_an_index_that_others_keep_replacing_is_an_error(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settle, "_SETTLE_SECONDS", 0.001)
    tag = sample.root.digest.replace(":", "-")

    def replace_it(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
        answer = proceed(request)
        index = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": []}
        registry.add_manifest("a/b", index, tag)
        return answer

    rude = wrong.Misbehaviour(on=wrong.manifest(tag, "PUT"), act=replace_it)
    with Registry(misbehave=[wrong.no_referrers(), rude]) as registry:
        sample.serve(registry)
        content = referring(registry, sample, "x/y")
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            with pytest.raises(RegistryError, match="does not stay listed"):
                repository.put_manifest(content, media_types.MANIFEST)
            registry.misbehaviours[:] = [wrong.no_referrers()]
            repository.put_manifest(content, media_types.MANIFEST)
            index = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": []}
            registry.add_manifest("a/b", index, tag)
            repository.settle()
            assert len(repository.referrers(sample.root.digest)) == 1, "written again"


@pytest.mark.parametrize("times", [1, 5])
def test_a_blob_that_the_registry_does_not_know_yet_is_waited_for(times: int, sample: Sample) -> None:
    """docker-registry answers so while others upload the same blob; seen with five signers at once."""
    body = b'{"errors": [{"code": "DIGEST_INVALID"}, {"code": "MANIFEST_BLOB_UNKNOWN"}]}'

    def forget(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
        request.body()
        return Answer(status=400, headers={"Content-Type": "application/json"}, body=body)

    forgets = wrong.Misbehaviour(on=wrong.manifest(None, "PUT"), act=forget, times=times)
    with Registry(misbehave=[forgets]) as registry:
        sample.serve(registry)
        content = referring(registry, sample, "x/y")
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            if times == 1:
                digest = repository.put_manifest(content, media_types.MANIFEST)
                assert digest in registry.repositories["a/b"].manifests
            else:
                with pytest.raises(RegistryError, match="fails"):
                    repository.put_manifest(content, media_types.MANIFEST)
    assert len([each for each in registry.requests if each.method == "PUT"]) == (2 if times == 1 else 3)


@pytest.mark.parametrize("kind", [cosign_tags.SIGNATURES, cosign_tags.ATTESTATIONS])
def test_signers_at_the_same_time_lose_nothing_under_cosign_s_tags(kind: str, sample: Sample) -> None:
    """Each reads what is there before the others write theirs."""
    barrier = threading.Barrier(5)
    tag = cosign_tags.tag_of(sample.root.digest, kind)

    def wait_for_others(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
        with contextlib.suppress(threading.BrokenBarrierError):
            barrier.wait(1)
        return proceed(request)

    together = wrong.Misbehaviour(on=wrong.manifest(tag, "PUT"), act=wait_for_others, times=5)
    with Registry(misbehave=[together]) as registry:
        sample.serve(registry)
        blobs = [registry.add_blob("a/b", f"signature {number}".encode()) for number in range(5)]

        def attach(digest: str) -> None:
            layer = {"mediaType": media_types.SIMPLE_SIGNATURE, "digest": digest, "size": 11}
            _, content = cosign_tags.image_of([layer])
            with Repository(named(f"{registry.host}/a/b"), access_to(settings=CALM)) as repository:
                config = json.loads(content)["config"]
                registry.add_blob("a/b", cosign_tags.image_of([layer])[0])
                assert config["digest"] in registry.repositories["a/b"].blobs
                cosign_tags.put(repository, tag, content, media_types.MANIFEST)
                repository.settle()

        with ThreadPoolExecutor(5) as pool:
            list(pool.map(attach, blobs))
        there = registry.repositories["a/b"]
        _, content = there.manifests[there.tags[tag]]
        assert sorted(each["digest"] for each in cosign_tags.layers(content)) == sorted(blobs)


@pytest.mark.parametrize("media_type", ["", "text/plain", "a/b\r\nX-Evil: 1", "ä/ö"])
def test_what_is_no_manifest_is_not_stored(media_type: str) -> None:
    with Repository(named("127.0.0.1:1/a/b"), access_to()) as repository, pytest.raises(FormatError):
        repository.put_manifest(b"{}", media_type)


# Who is there, and who is not.


def test_a_refused_connection_is_said_at_once(tmp_path: Path) -> None:
    access = access_to(settings=TransferSettings())
    with within(1), pytest.raises(RegistryError, match="cannot be reached"):
        pull(f"127.0.0.1:{free_port()}/a/b:1", Layout.create(tmp_path), access)


def test_a_host_that_takes_no_connections_is_tried_for_two_timeouts(tmp_path: Path) -> None:
    with deaf_port() as port, within(2.6), pytest.raises(RegistryError, match="in time"):
        pull(f"127.0.0.1:{port}/a/b:1", Layout.create(tmp_path), access_to())


@contextlib.contextmanager
def deaf_port() -> Iterator[int]:
    """A port that answers nobody: its queue is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(address)
        time.sleep(0.05)
        yield address[1]


def test_loopback_needs_no_proxy(sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with Registry() as registry:
        sample.serve(registry)
        target = Layout.create(tmp_path)
        pull(f"{registry.host}/a/b:1", target, access_to())
        assert_all_there(target, sample.root, sample)


@pytest.mark.parametrize(
    "proxy", ["socks5://127.0.0.1:1", "http://", "http://127.0.0.1:99999", "http://a..b:1", "http://[::1"]
)
def test_a_proxy_that_cannot_be_used(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with Repository(named("registry.invalid/a/b"), access_to()) as repository:  # noqa: SIM117
        with pytest.raises(RegistryError, match="proxy"):
            repository.resolve()


@pytest.mark.parametrize("host", ["a..b", f"{'a' * 64}.example", f"{'a.' * 200}example", "[12::34::56]"])
def test_a_host_that_cannot_be_one(host: str) -> None:
    with pytest.raises(UsageError, match="is not a registry"):
        Repository(named(f"{host}:5000/a/b"), access_to())


@pytest.mark.parametrize(
    ("host", "scheme"),
    [
        ("127.0.0.1:5000", "http"),
        ("localhost:5000", "http"),
        ("[::1]:5000", "http"),
        ("[2001:db8::1]:5000", "https"),
        ("127.0.0.1.example.com", "https"),
        ("127.example.com", "https"),
        ("localhost.example.com", "https"),
        ("registry.example.com", "https"),
    ],
)
def test_only_loopback_is_spoken_to_in_plain_text(host: str, scheme: str) -> None:
    with Repository(named(f"{host}/a/b"), access_to()) as repository:
        assert repository._routes.origin.url.scheme == scheme


# Ending.


@pytest.mark.parametrize(
    "make",
    [
        lambda: wrong.stalls(blob(), after_bytes=-1),
        lambda: wrong.stalls(blob(), after_bytes=100),
        lambda: wrong.slow(blob(), 1),
        lambda: wrong.status(429, on=blob(), retry_after=30),
        lambda: wrong.closes(blob()),
        lambda: wrong.ignores_range(blob(), skip=10**6),
    ],
)
@pytest.mark.parametrize("extra", ["", "close", "chunked", "no ranges"])
def test_a_transfer_can_be_ended_from_outside(
    make: Callable[[], Misbehave], extra: str, sample: Sample, tmp_path: Path
) -> None:
    settings = TransferSettings(jobs=4, retry=RetryPolicy(attempts=10))
    more = {
        "close": [wrong.header(ANYTHING, "Connection", "close")],
        "chunked": [wrong.chunked(blob())],
        "no ranges": [wrong.ignores_range()],
    }
    with Registry(misbehave=[*more.get(extra, []), make()]) as registry:
        sample.serve(registry)
        access = access_to(settings=settings, rate=200_000)
        with Repository(named(f"{registry.host}/a/b:1"), access) as repository:
            tree = transfer.explore(repository, repository.resolve(), access.config.limits)
            stream = repository.open_blob(sample.big)
            timer = threading.Timer(0.5, repository.cancel)
            timer.start()
            with within(1.7), pytest.raises(RekindleError):
                transfer.into_layout(repository, tree, Layout.create(tmp_path), "pulled", access)
            with within(0.5), pytest.raises(RekindleError):
                stream.read()
            stream.close()
            with pytest.raises(RegistryError, match="ended"):
                repository.open_blob(sample.big)
            timer.join()


def test_a_push_can_be_ended_from_outside(sample: Sample) -> None:
    with Registry(misbehave=[wrong.stalls(upload(), after_bytes=100)]) as registry:
        access = access_to(settings=TransferSettings(jobs=4))
        tree = transfer.explore(sample.layout, sample.root, access.config.limits)
        with Repository(named(f"{registry.host}/a/b:1"), access) as repository:
            timer = threading.Timer(0.3, repository.cancel)
            timer.start()
            with within(1.3), pytest.raises(RekindleError):
                transfer.copy(sample.layout, tree, repository, tag="1", jobs=4, tally=access.tally)
            timer.join()


def test_a_connection_that_is_being_made_can_be_ended() -> None:
    access = access_to(settings=TransferSettings())
    with deaf_port() as port, Repository(named(f"127.0.0.1:{port}/a/b"), access) as r:
        timer = threading.Timer(0.2, r.cancel)
        timer.start()
        with within(1.2), pytest.raises(RegistryError):
            r.resolve()
        timer.join()


def test_streams_need_not_be_read_to_their_end(sample: Sample) -> None:
    with Registry() as registry:
        sample.serve(registry)
        with Repository(named(f"{registry.host}/a/b"), access_to()) as repository:
            for _ in range(20):
                with repository.open_blob(sample.big) as stream:
                    stream.read(1)
            with repository.open_blob(sample.big) as stream:
                assert stream.read() == sample.content(sample.big)


@pytest.mark.parametrize("make", [list, lambda: [wrong.ignores_range()]])
def test_many_streams_at_once_are_each_right(
    make: Callable[[], list[Misbehave]], sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers go from hand to hand, with losers of races among those who wrote to them."""
    monkeypatch.setattr(download, "_STRAGGLER_SECONDS", 0.0)
    monkeypatch.setattr(download, "_LOOK_SECONDS", 0.001)
    hiccups = wrong.Misbehaviour(on=blob(), act=hiccup)
    with Registry(misbehave=[*make(), hiccups]) as registry:
        sample.serve(registry)
        settings = TransferSettings(jobs=8, retry=RetryPolicy(attempts=50))
        with Repository(named(f"{registry.host}/a/b"), access_to(settings=settings)) as repository:
            wanted, got = sample.content(sample.big), []

            def read() -> None:
                with repository.open_blob(sample.big) as stream:
                    got.append(stream.read() == wanted)

            threads = [threading.Thread(target=read) for _ in range(12)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(30)
            assert got == [True] * 12


def hiccup(request: Request, proceed: Callable[[Request], Answer]) -> Answer:
    answer = proceed(request)
    dice = random.random()
    if dice < 0.1:
        return replace(answer, cut_after=int(dice * 10 * len(answer.body)), ending=Ending.CLOSE)
    if dice < 0.3:
        return replace(answer, bytes_per_second=STRETCH * 4)
    return answer


def test_a_rate_is_kept_to(sample: Sample, tmp_path: Path) -> None:
    with Registry() as registry:
        sample.serve(registry)
        began = time.monotonic()
        rate = sample.big.size
        pull(f"{registry.host}/a/b:1", Layout.create(tmp_path), access_to(rate=rate))
        assert 0.6 < time.monotonic() - began < 2
        began = time.monotonic()
        push(sample, f"{registry.host}/c/d:1", access_to(rate=rate))
        assert 0.6 < time.monotonic() - began < 2
