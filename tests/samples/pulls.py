# SPDX-License-Identifier: Apache-2.0
"""Pulls from a registry that misbehaves, and what must come of each."""

from collections.abc import Callable
from pathlib import Path

import pytest

from oci import media_types
from oci.layout import Layout
from oci.registry import download
from tests.samples.registry import (
    Case,
    Make,
    Sample,
    access_to,
    assert_all_there,
    assert_nothing_to_see,
    blobs_below,
    expecting,
    pull,
    said,
    sent,
    within,
)
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.access import PASSWORD
from tests.servers.registry.misbehaviour import TOKEN, blob, manifest
from tests.servers.registry.simulator import Misbehave, Registry
from tests.servers.registry.wire import Answer, Kind


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


def any_size(answer: Answer) -> Answer:
    if "Content-Range" in answer.headers:
        answer.headers["Content-Range"] = answer.headers["Content-Range"].partition("/")[0] + "/*"
    return answer


def assert_pause(registry: Registry, seconds: float) -> None:
    first, second = registry.asked("GET", Kind.MANIFEST)[:2]
    assert second.started - first.started >= seconds


def assert_ranges(registry: Registry, digest: str, ranges: list[str | None]) -> None:
    assert [r.headers.get("range") for r in registry.downloads(digest)] == ranges


def check_pull(case: Case, sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
