# SPDX-License-Identifier: Apache-2.0
"""Images from one place to another: what is explored, what is brought, in which order, what counts."""

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from oci import attached, cosign_tags, media_types, transfer
from oci.descriptor import Blobs, BlobSource, Descriptor
from oci.layout import Layout
from oci.progress import Limiter, Tally
from oci.reference import RegistryReference, parse
from oci.registry.access import Access
from rekindle.config import Config, Limits
from rekindle.digest import Digest
from rekindle.errors import (
    CredentialsError,
    FormatError,
    IntegrityError,
    NotFoundError,
    RegistryError,
    RekindleError,
    UsageError,
)
from rekindle.report import AttachmentResult

LAYER = "application/octet-stream"


def put_manifest(layout: Layout, *blobs: Descriptor, **more: Any) -> Descriptor:
    document = {"schemaVersion": 2, "mediaType": media_types.MANIFEST, "layers": [b.to_json() for b in blobs]}
    return layout.put(json.dumps(document | more).encode(), media_types.MANIFEST)


def put_index(layout: Layout, *manifests: Descriptor, **more: Any) -> Descriptor:
    entries = [m.to_json() for m in manifests]
    document = {"schemaVersion": 2, "mediaType": media_types.INDEX, "manifests": entries}
    return layout.put(json.dumps(document | more).encode(), media_types.INDEX)


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout.create(tmp_path / "source")


@pytest.fixture
def access() -> Access:
    return Access(config=Config(), tally=Tally(), limiter=Limiter(None), find_credentials=lambda _: None)


def explore(layout: Layout, root: Descriptor, **limits: int) -> transfer.Tree:
    return transfer.explore(layout, root, Limits(**limits))


# Exploring.


def test_nodes_come_after_those_that_they_name(layout: Layout) -> None:
    shared, own, config = (layout.put(text, LAYER) for text in (b"shared", b"own", b"config"))
    first = put_manifest(layout, shared, config=config.to_json())
    second = put_manifest(layout, shared, own)
    inner = put_index(layout, second, first)
    root = put_index(layout, first, inner)
    tree = explore(layout, root)
    assert [node.descriptor.digest for node in tree.nodes] == [
        first.digest,
        second.digest,
        inner.digest,
        root.digest,
    ]
    assert {blob.digest for blob in tree.blobs} == {shared.digest, own.digest, config.digest}
    assert all(Digest.of_bytes(node.content) == node.descriptor.digest for node in tree.nodes)


def test_indexes_within_indexes_end_somewhere(layout: Layout) -> None:
    node = put_manifest(layout)
    for _ in range(4):
        node = put_index(layout, node)
    assert len(explore(layout, node).nodes) == 5
    with pytest.raises(FormatError, match="nested too deep"):
        explore(layout, put_index(layout, node))


def test_a_digest_has_one_size(layout: Layout) -> None:
    blob = layout.put(b"blob", LAYER)
    other = Descriptor(media_type=LAYER, digest=blob.digest, size=5)
    with pytest.raises(FormatError, match="two sizes"):
        explore(layout, put_manifest(layout, blob, other))
    manifest = put_manifest(layout, blob)
    longer = Descriptor(media_type=media_types.MANIFEST, digest=manifest.digest, size=manifest.size + 1)
    with pytest.raises(FormatError, match="two sizes"):
        explore(layout, put_index(layout, manifest, longer))
    as_blob = Descriptor(media_type=LAYER, digest=manifest.digest, size=1)
    with pytest.raises(FormatError, match="two sizes"):
        explore(layout, put_index(layout, manifest, put_manifest(layout, as_blob)))


def test_there_are_no_more_layers_and_bytes_than_is_sane(layout: Layout) -> None:
    blobs = [layout.put(bytes([number]), LAYER) for number in range(4)]
    root = put_manifest(layout, *blobs)
    assert len(explore(layout, root, layers=4).blobs) == 4
    with pytest.raises(FormatError, match="at most 3"):
        explore(layout, root, layers=3)
    with pytest.raises(FormatError, match="the limit is"):
        explore(layout, root, manifest_bytes=root.size - 1)


def test_manifests_together_are_bounded(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = [put_manifest(layout, annotations={"filler": "x" * 1000, "n": str(n)}) for n in range(5)]
    root = put_index(layout, *manifests)
    assert len(explore(layout, root).nodes) == 6
    monkeypatch.setattr(transfer, "_NODES_BYTES", 3000)
    with pytest.raises(FormatError, match="more than 3000 bytes"):
        explore(layout, root)
    monkeypatch.undo()
    monkeypatch.setattr(transfer, "_NODES_LIMIT", 3)
    with pytest.raises(FormatError, match="nested too deep"):
        explore(layout, root)


@pytest.mark.parametrize("media_type", ["", LAYER, "application/json"])
def test_what_is_no_manifest_is_no_image(media_type: str, layout: Layout) -> None:
    with pytest.raises(FormatError, match="not an image"):
        explore(layout, layout.put(b"{}", media_type))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"\0",
        b'{"layers": {}}',
        b'{"layers": [1]}',
        b'{"layers": null}',
        b'{"config": "x"}',
        b'{"config": {"mediaType": "x", "digest": "sha256:x", "size": 1}}',
        b'{"config": {"mediaType": "x", "digest": "sha256:%064d", "size": -1}}' % 0,
        b'{"manifests": [{}]}',
    ],
)
def test_manifests_that_are_none(content: bytes, layout: Layout) -> None:
    with pytest.raises(FormatError):
        explore(layout, layout.put(content, media_types.MANIFEST))


# What is attached: it can break nothing.


class Attached:
    """A layout, and what a registry lists as attached to an image in it."""

    def __init__(self, layout: Layout, *listed: Descriptor, error: Exception | None = None) -> None:
        self._layout, self._listed, self._error = layout, listed, error
        self.read, self.open_blob = layout.read, layout.open_blob
        self.cancel, self.fall_back_to_origin = layout.cancel, layout.fall_back_to_origin

    def referrers(self, _: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        if self._error:
            raise self._error
        return list(self._listed)


def attach(layout: Layout, root: Descriptor, *blobs: Descriptor, **more: Any) -> Descriptor:
    return put_manifest(layout, *blobs, subject=root.to_json(), **more)


def test_what_is_attached_comes_along(layout: Layout, tmp_path: Path, access: Access) -> None:
    shared, signed = layout.put(b"shared", LAYER), layout.put(b"signature", LAYER)
    root = put_manifest(layout, shared)
    referrer = attach(layout, root, signed, shared)
    source = Attached(layout, referrer, referrer, root)
    tree = transfer.explore(source, root, Limits())
    assert [each.node.descriptor for each in tree.attached] == [referrer]
    assert [blob.digest for blob in tree.blobs] == [shared.digest]
    target = Layout.create(tmp_path / "target")
    transfer.into_layout(source, tree, target, "name:1", access)
    assert [each.digest for each in target.referrers(root.digest)] == [referrer.digest]
    assert target.has(signed)
    assert (access.tally.expected_bytes, access.tally.reused_bytes) == (15, 0)


def test_what_cannot_be_fetched_of_it_is_left_out(layout: Layout, tmp_path: Path, access: Access) -> None:
    blob, missing = (Descriptor(media_type=LAYER, digest=Digest.of_bytes(b), size=3) for b in (b"a", b"b"))
    kept = layout.put(b"kept", LAYER)
    root = put_manifest(layout, kept)
    bad = [attach(layout, root, blob), attach(layout, root, kept, config=missing.to_json())]
    good = attach(layout, root, kept)
    source = Attached(layout, *bad, good)
    tree = transfer.explore(source, root, Limits())
    assert len(tree.attached) == 3
    target = Layout.create(tmp_path / "target")
    transfer.into_layout(source, tree, target, "name:1", access)
    assert target.resolve("name:1").digest == root.digest
    assert [each.digest for each in target.referrers(root.digest)] == [good.digest]
    assert target.reachable(list(target.tags().values())) == {root.digest, kept.digest}


def test_what_does_not_fit_the_image_is_left_out(layout: Layout) -> None:
    blob = layout.put(b"blob", LAYER)
    root = put_manifest(layout, blob)
    other = Descriptor(media_type=LAYER, digest=blob.digest, size=5)
    unknown = Descriptor(media_type=LAYER, digest=Digest.of_bytes(b"x"), size=1)
    larger = Descriptor(media_type=LAYER, digest=unknown.digest, size=17 << 20)
    source = Attached(
        layout,
        attach(layout, root, other),
        attach(layout, root, config=other.to_json()),
        attach(layout, root, unknown, larger),
        attach(layout, root, larger),
        attach(layout, root, put_manifest(layout)),
        attach(layout, blob),
        put_manifest(layout, annotations={"refers": "to nothing"}),
        layout.put(b"{", media_types.MANIFEST),
        Descriptor(media_type=media_types.MANIFEST, digest=unknown.digest, size=1),
        good := attach(layout, root, blob),
    )
    tree = transfer.explore(source, root, Limits())
    assert [each.node.descriptor for each in tree.attached] == [good]


def nested(layout: Layout, root: Descriptor) -> list[Descriptor]:
    """A report, its signature, and what refers to that, and so on, for as long as it is followed."""
    chain = [attach(layout, root, layout.put(b"report", LAYER), artifactType="application/vnd.report")]
    for number in range(3):
        chain.append(signature(layout, chain[-1], bytes([number])))
    return chain


def test_attachments_of_attachments_come_along(layout: Layout, tmp_path: Path, access: Access) -> None:
    root = put_manifest(layout)
    chain = nested(layout, root)
    deeper = signature(layout, chain[-1], b"too deep")
    layout.attach(layout, [deeper, *reversed(chain)])
    tree = transfer.explore(layout.frozen(), root, Limits(), jobs=4)
    assert [each.node.descriptor.digest for each in tree.attached] == [each.digest for each in chain]
    target = Layout.create(tmp_path / "target")
    transfer.into_layout(layout, tree, target, "name:1", access)
    target.collect_garbage()
    for subject, each in zip([root, *chain], chain, strict=False):
        assert [found.digest for found in target.referrers(subject.digest)] == [each.digest]
    target.expect_garbage("name:1")
    target.publish(target, layout_image(target), "name:1")
    target.collect_garbage(only_noted=True)
    assert not target.referrers(root.digest)
    assert not [each for each in (root, *chain) if target.contains(each)], "they go with their image"


def test_there_are_no_more_questions_than_is_sane(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    root = put_manifest(layout)
    reports = [
        attach(layout, root, annotations={"n": str(number)}, artifactType="application/vnd.report")
        for number in range(5)
    ]
    signed = signature(layout, root)
    of_reports = [signature(layout, each, bytes([number])) for number, each in enumerate(reports)]
    layout.attach(layout, [signed, *reports, *of_reports])
    monkeypatch.setattr(attached, "_ASKED_LIMIT", 3)
    tree = transfer.explore(layout, root, Limits())
    found = {each.node.descriptor.digest for each in tree.attached}
    assert found >= {signed.digest, *(each.digest for each in reports)}
    assert len(found) == 6 + 3, "reports are more likely to have something attached than signatures"
    problems = [each.problem for each in tree.left_out]
    assert problems == [
        "what is attached to 3 attachments was not looked for",
        "what is attached to 3 attachments was not looked for",
    ]


def test_what_is_attached_to_what_was_not_copied_is_told(layout: Layout) -> None:
    root = put_manifest(layout)
    report, signed, *_ = chain = nested(layout, root)
    layout.attach(layout, chain)
    target = Target()
    target.refuse = lambda digest: raise_if(RegistryError("400"), digest == report.digest)
    results = transfer.copy(
        layout, transfer.explore(layout, root, Limits()), target, tag="1", jobs=1, tally=Tally()
    )
    assert [each.problem for each in results] == ["400"] + ["what it is attached to was not copied"] * 3
    assert signed.digest not in target.there
    assert target.tags["1"].digest == root.digest


def test_a_list_of_attachments_that_makes_no_sense_is_told(layout: Layout) -> None:
    root = put_manifest(layout)
    tree = transfer.explore(Attached(layout, error=FormatError("no list")), root, Limits())
    assert tree.attached == []
    [told] = tree.left_out
    assert (told.digest, told.subject, told.problem) == ("", root.digest, "no list")
    with pytest.raises(RegistryError):
        transfer.explore(Attached(layout, error=RegistryError("down")), root, Limits())


def test_many_attachments_are_not_all_copied_and_that_is_told(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = put_manifest(layout)
    many = [attach(layout, root, annotations={"n": str(number)}) for number in range(70)]
    reports = [structs.replace(each, artifact_type="application/vnd.report") for each in many]
    source = Attached(layout, *reports[:-1], structs.replace(many[-1], artifact_type=media_types.BUNDLE))
    monkeypatch.setattr(attached, "LIMIT", 5)
    tree = transfer.explore(source, root, Limits())
    assert [each.node.descriptor.digest for each in tree.attached] == [
        each.digest for each in (many[-1], *many[:4])
    ]
    assert {each.digest for each in tree.left_out} == {each.digest for each in many[4:-1]}
    assert {each.problem for each in tree.left_out} == {"more than 5 attachments are not copied"}
    monkeypatch.setattr(attached, "_BYTES_LIMIT", 2 * many[-1].size)
    assert len(transfer.explore(source, root, Limits()).attached) == 2


def signature(layout: Layout, root: Descriptor, text: bytes = b"signature") -> Descriptor:
    return attach(layout, root, layout.put(text, media_types.BUNDLE))


def test_what_is_attached_follows_its_subject_and_the_tag_is_last(layout: Layout) -> None:
    root = put_manifest(layout)
    signed = signature(layout, root)
    target = Target()
    copy_attached(Attached(layout, signed), root, target)
    manifests = [each for each in target.told if each[0] != "blob"]
    assert manifests == [("manifest", root.digest), ("manifest", signed.digest), ("1", root.digest)]


def copy_attached(source: Attached, root: Descriptor, target: "Target") -> list[AttachmentResult]:
    tree = transfer.explore(source, root, Limits())
    return transfer.copy(source, tree, target, tag="1", jobs=1, tally=Tally())


ERRORS = [NotFoundError("404"), RegistryError("400"), IntegrityError("other"), CredentialsError("403")]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_signature_that_the_target_does_not_take_is_an_error(layout: Layout, error: RekindleError) -> None:
    root = put_manifest(layout)
    signed = signature(layout, root)
    target = Target()
    target.refuse = lambda digest: raise_if(error, digest == signed.digest)
    with pytest.raises((RegistryError, CredentialsError), match="does not take the signature") as caught:
        copy_attached(Attached(layout, signed), root, target)
    assert caught.value.cause == error.message
    assert "1" not in target.tags, "what the tag meant before may be signed"


def raise_if(error: Exception, condition: bool) -> None:
    if condition:
        raise error


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_report_that_the_target_does_not_take_is_told(layout: Layout, error: RekindleError) -> None:
    root = put_manifest(layout)
    report = attach(layout, root, layout.put(b"report", LAYER), artifactType="application/vnd.report")
    target = Target()
    target.refuse = lambda digest: raise_if(error, digest == report.digest)
    [fate] = copy_attached(Attached(layout, report), root, target)
    assert (fate.digest, fate.artifact_type, fate.problem) == (
        report.digest,
        "application/vnd.report",
        error.message,
    )
    assert target.tags["1"].digest == root.digest


def test_a_signature_that_is_there_is_stored_again(layout: Layout) -> None:
    """The attempt before may have ended before it was listed."""
    root = put_manifest(layout)
    signed = signature(layout, root)
    target = Target(signed)
    copy_attached(Attached(layout, signed), root, target)
    assert ("manifest", signed.digest) in target.told


# Older signatures.


def simple(layout: Layout, *texts: bytes) -> Descriptor:
    """An image of older signatures, as cosign before 2.6 makes them."""
    layers = []
    for text in texts:
        put = layout.put(text, media_types.SIMPLE_SIGNATURE).to_json()
        layers.append({**put, "annotations": {"dev.cosignproject.cosign/signature": "AAAA"}})
    config = layout.put(b'{"made": "by cosign"}', media_types.IMAGE_CONFIG)
    return put_manifest(layout, config=config.to_json(), layers=layers)


def test_older_signatures_are_added_to_those_of_others(
    layout: Layout, tmp_path: Path, access: Access
) -> None:
    root = put_manifest(layout)
    tag = cosign_tags.tag_of(root.digest, cosign_tags.SIGNATURES)
    target = Layout.create(tmp_path / "target")
    for texts in ((b"theirs", b"both"), (b"both", b"ours"), (b"ours",)):
        there = simple(layout, *texts)
        find = {tag: there}.get
        tree = transfer.explore(layout, root, Limits(), tagged=find)
        assert [(each.tag, each.is_signature) for each in tree.attached] == [(tag, True)]
        transfer.into_layout(layout, tree, target, "name:1", access)
    merged = target.tagged(tag)
    assert merged is not None
    layers = cosign_tags.layers(target.read(merged, limit_bytes=1 << 20))
    expected = [Digest.of_bytes(text) for text in (b"theirs", b"both", b"ours")]
    assert [each["digest"] for each in layers] == expected
    assert len(target.referrers(root.digest)) == 1
    target.collect_garbage()
    assert all(target.contains(layout.put(text, LAYER)) for text in (b"theirs", b"both", b"ours"))
    target.publish(target, layout_image(target), "name:1")
    target.collect_garbage()
    assert target.tagged(tag) is None, "they go with their image"


def under_tag(layout: Layout, kind: str, text: bytes) -> Descriptor:
    """An image as cosign stores it under one of its tags."""
    media_type = {"att": media_types.ENVELOPE, "sbom": "text/spdx+json"}[kind]
    config = layout.put(b'{"made": "by cosign"}', media_types.IMAGE_CONFIG)
    return put_manifest(layout, layout.put(text, media_type), config=config.to_json())


def test_older_attestations_and_sboms_are_copied_as_they_are(
    layout: Layout, tmp_path: Path, access: Access
) -> None:
    part = put_manifest(layout)
    root = put_index(layout, part)
    there = {
        cosign_tags.tag_of(root.digest, "att"): under_tag(layout, "att", b"of the index"),
        cosign_tags.tag_of(part.digest, "att"): under_tag(layout, "att", b"of a part"),
        # The same SBOM of both: it is one manifest under two tags.
        cosign_tags.tag_of(root.digest, "sbom"): under_tag(layout, "sbom", b"what is in it"),
        cosign_tags.tag_of(part.digest, "sbom"): under_tag(layout, "sbom", b"what is in it"),
    }
    there[cosign_tags.tag_of(there[cosign_tags.tag_of(root.digest, "sbom")].digest, "sig")] = simple(
        layout, b"of the SBOM"
    )
    tree = transfer.explore(layout, root, Limits(), tagged=there.get, jobs=4)
    assert {each.tag: each.node.descriptor.digest for each in tree.attached} == {
        tag: each.digest for tag, each in there.items()
    }
    assert {each.artifact_type for each in tree.attached} == {
        media_types.ENVELOPE,
        media_types.SIMPLE_SIGNATURE,
        "text/spdx+json",
    }
    assert {each.tag[72:] for each in tree.attached if each.is_signature} == {"att", "sig"}
    target = Layout.create(tmp_path / "target")
    results = transfer.into_layout(layout, tree, target, "name:1", access)
    assert not [each for each in results if each.problem]
    target.collect_garbage()
    for tag, each in there.items():
        found = target.tagged(tag)
        assert found is not None
        assert found.digest == each.digest, "cosign may have signed its digest"
    again = transfer.explore(target.frozen(), root, Limits(), tagged=target.tagged)
    assert {each.tag for each in again.attached} == there.keys()


def test_an_sbom_of_others_is_not_replaced(layout: Layout, tmp_path: Path, access: Access) -> None:
    root = put_manifest(layout)
    tag = cosign_tags.tag_of(root.digest, "sbom")
    target = Layout.create(tmp_path / "target")
    theirs = under_tag(layout, "sbom", b"theirs")
    tree = transfer.explore(layout, root, Limits(), tagged={tag: theirs}.get)
    transfer.into_layout(layout, tree, target, "name:1", access)
    tree = transfer.explore(layout, root, Limits(), tagged={tag: under_tag(layout, "sbom", b"ours")}.get)
    [result] = transfer.into_layout(layout, tree, target, "name:1", access)
    assert f"another SBOM is under {tag}" in result.problem
    found = target.tagged(tag)
    assert found is not None
    assert found.digest == theirs.digest


def test_a_signature_is_copied_before_attestations(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    root = put_manifest(layout)
    attestations = [signature(layout, root, bytes([number])) for number in range(30)]
    kinds = {media_types.PREDICATE: "https://slsa.dev/provenance/v1"}
    listed = [
        structs.replace(each, artifact_type=media_types.BUNDLE, annotations=kinds) for each in attestations
    ]
    signed, notation, unknown = (signature(layout, root, text) for text in (b"signed", b"notation", b"x"))
    listed += [
        structs.replace(unknown, artifact_type=media_types.EMPTY),  # as cosign 3 lists what it signs
        structs.replace(notation, artifact_type=media_types.NOTATION),
        structs.replace(
            signed,
            artifact_type=media_types.BUNDLE,
            annotations={media_types.PREDICATE: media_types.SIGN_PREDICATE},
        ),
    ]
    monkeypatch.setattr(attached, "LIMIT", 4)
    tree = transfer.explore(Attached(layout, *listed), root, Limits())
    assert [each.node.descriptor.digest for each in tree.attached] == [
        each.digest for each in (notation, signed, unknown, attestations[0])
    ]


def layout_image(layout: Layout) -> Descriptor:
    return put_manifest(layout, annotations={"another": "image"})


# Bringing.


class Target:
    """Takes note of what it is told."""

    def __init__(self, *there: Descriptor, mounts: tuple[Descriptor, ...] = ()) -> None:
        self.there = {each.digest for each in there}
        self.mounts = {each.digest for each in mounts}
        self.told: list[tuple[str, str]] = []
        self.cancelled = False
        self.hold: Callable[[], object] = lambda: None
        self.refuse: Callable[[Digest], object] = lambda _: None
        self.tags: dict[str, Descriptor] = {}
        self.content: dict[Digest, bytes] = {}
        self._lock = threading.Lock()

    def _tell(self, *what: str) -> None:
        with self._lock:
            self.told.append((what[0], what[1]))

    def has(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self.there

    def mount(self, descriptor: Descriptor) -> bool:
        return descriptor.digest in self.mounts

    def upload(self, descriptor: Descriptor, source: BlobSource) -> None:
        with source.open_blob(descriptor) as stream:
            content = stream.read()
        self.hold()
        if Digest.of_bytes(content) != descriptor.digest:
            raise IntegrityError(f"{descriptor.digest} is wrong")
        self._tell("blob", descriptor.digest)
        self.there.add(descriptor.digest)

    def put_manifest(self, content: bytes, media_type: str, name: str | None = None) -> Digest:
        digest = Digest.of_bytes(content)
        self.refuse(digest)
        self._tell(name or "manifest", digest)
        self.there.add(digest)
        self.content[digest] = content
        if name:
            self.tags[name] = Descriptor(media_type=media_type, digest=digest, size=len(content))
        return digest

    def tagged(self, tag: str) -> Descriptor | None:
        return self.tags.get(tag)

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        return self.content[descriptor.digest]

    def keep(self, tag: str, write_again: Callable[[], bool]) -> None: ...

    def settle(self) -> None: ...

    def cancel(self) -> None:
        self.cancelled = True


class Source:
    """A layout which gives wrong bytes of some blobs, until told to fall back to the origin."""

    def __init__(self, layout: Layout, *wrong: Descriptor, places: int = 2) -> None:
        self._layout = layout
        self._wrong = {each.digest for each in wrong}
        self._places = places
        self.opened: list[Digest] = []
        self.cancelled = False

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        return self._layout.read(descriptor, limit_bytes=limit_bytes)

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        self.opened.append(descriptor.digest)
        if descriptor.digest in self._wrong and self._places > 1:
            return io.BytesIO(b"wrong")  # type: ignore[return-value]
        return self._layout.open_blob(descriptor)

    def referrers(self, digest: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        return self._layout.referrers(digest, artifact_type=artifact_type)

    def cancel(self) -> None:
        self.cancelled = True

    def fall_back_to_origin(self) -> bool:
        self._places -= 1
        return self._places > 0


@pytest.fixture
def tree(layout: Layout) -> transfer.Tree:
    blobs = [layout.put(bytes(size), LAYER) for size in (1, 100, 10)]
    return explore(layout, put_index(layout, put_manifest(layout, *blobs)))


def copy(source: Blobs, tree: transfer.Tree, target: Target, *, jobs: int = 1) -> Tally:
    tally = Tally()
    transfer.copy(source, tree, target, tag="1", jobs=jobs, tally=tally)
    return tally


def test_the_largest_first_and_the_tag_last(layout: Layout, tree: transfer.Tree) -> None:
    target = Target()
    copy(layout, tree, target)
    small, large, middle = tree.blobs
    manifest, root = (node.descriptor for node in tree.nodes)
    assert target.told == [
        ("blob", large.digest),
        ("blob", middle.digest),
        ("blob", small.digest),
        ("manifest", manifest.digest),
        ("1", root.digest),
    ]
    assert not target.cancelled


def test_what_is_there_or_mounted_is_counted_and_not_brought(layout: Layout, tree: transfer.Tree) -> None:
    _, large, middle = tree.blobs
    target = Target(large, tree.nodes[0].descriptor, mounts=(middle,))
    tally = copy(layout, tree, target)
    assert [name for name, _ in target.told] == ["blob", "1"]
    assert (tally.expected_bytes, tally.reused_bytes) == (111, 110)
    assert (tally.blobs, tally.reused_blobs) == (3, 2)


def test_an_image_without_blobs(layout: Layout) -> None:
    target = Target()
    copy(layout, explore(layout, put_manifest(layout)), target)
    assert [name for name, _ in target.told] == ["1"]


def test_wrong_bytes_are_asked_for_elsewhere(layout: Layout, tree: transfer.Tree) -> None:
    small, large, middle = tree.blobs
    source, target = Source(layout, small), Target(middle)
    tally = copy(source, tree, target)
    assert source.opened == [large.digest, small.digest, small.digest]  # what came is not asked for again
    assert (tally.reused_blobs, tally.reused_bytes) == (1, 10)
    assert target.told[-1][0] == "1"
    assert not target.cancelled


def test_wrong_bytes_everywhere_are_an_error(layout: Layout, tree: transfer.Tree) -> None:
    source, target = Source(layout, *tree.blobs, places=1), Target()
    source._places = 2
    source.fall_back_to_origin = lambda: False  # type: ignore[method-assign]
    with pytest.raises(IntegrityError):
        copy(source, tree, target)
    assert source.cancelled
    assert target.cancelled
    assert not [name for name, _ in target.told if name != "blob"]


@pytest.mark.parametrize("error", [RegistryError("down"), KeyboardInterrupt()])
def test_the_first_error_ends_all(error: BaseException, layout: Layout) -> None:
    blobs = [layout.put(str(number).encode(), LAYER) for number in range(50)]
    tree = explore(layout, put_manifest(layout, *blobs))
    source, target = Source(layout), Target()
    started = []

    def hold() -> None:
        started.append(1)
        if len(started) == 2:
            raise error
        time.sleep(0.1)

    target.hold = hold
    with pytest.raises(type(error)):
        copy(source, tree, target, jobs=4)
    assert len(started) < 20
    assert source.cancelled
    assert target.cancelled
    assert "1" not in [name for name, _ in target.told]


def test_blobs_go_side_by_side(layout: Layout) -> None:
    blobs = [layout.put(str(number).encode(), LAYER) for number in range(8)]
    tree = explore(layout, put_manifest(layout, *blobs))
    target = Target()
    meeting = threading.Barrier(4, timeout=10)
    target.hold = meeting.wait
    copy(layout, tree, target, jobs=4)
    assert len(target.told) == 9


def test_into_a_layout_and_again(layout: Layout, tree: transfer.Tree, tmp_path: Path, access: Access) -> None:
    target = Layout.create(tmp_path / "target")
    transfer.into_layout(layout, tree, target, "name:1", access)
    assert target.resolve("name:1").digest == tree.nodes[-1].descriptor.digest
    assert access.tally.reused_blobs == 0
    transfer.into_layout(layout, tree, target, "name:2", access)
    assert access.tally.reused_blobs == 3
    assert sorted(target.tags()) == ["name:1", "name:2"]
    assert len(target.reachable(list(target.tags().values()))) == 5


def test_a_target_of_another_digest_is_refused(layout: Layout, tree: transfer.Tree, access: Access) -> None:
    target = parse(f"127.0.0.1:1/a/b@sha256:{0:064}")
    assert isinstance(target, RegistryReference)
    with pytest.raises(UsageError, match="another digest"):
        transfer.into_registry(layout, tree, target, access)


# Counting, and keeping to a rate.


def test_a_tally_counts_for_many_threads() -> None:
    tally = Tally()

    def count() -> None:
        for _ in range(1000):
            tally.expect(1)
            tally.reuse(2)
            tally.fetch(3)
            tally.send(4)

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tally.expected_bytes, tally.blobs) == (8000, 8000)
    assert (tally.reused_bytes, tally.reused_blobs) == (16000, 8000)
    assert (tally.fetched_bytes, tally.sent_bytes) == (24000, 32000)


def test_without_a_rate_nobody_waits() -> None:
    limiter = Limiter(None)
    began = time.monotonic()
    limiter.wait(1 << 40)
    assert time.monotonic() - began < 0.1
    assert limiter.piece_bytes(1 << 20) == 1 << 20


def test_all_threads_together_keep_to_the_rate() -> None:
    limiter = Limiter(100_000)
    began = time.monotonic()

    def move() -> None:
        for _ in range(5):
            limiter.wait(2_000)

    threads = [threading.Thread(target=move) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0.3 < time.monotonic() - began < 1  # 40,000 bytes, of which the last need not be waited for


def test_a_pause_is_not_made_up_for() -> None:
    limiter = Limiter(10_000)
    limiter.wait(1_000)
    time.sleep(0.3)
    limiter.wait(1_000)
    began = time.monotonic()
    limiter.wait(1_000)
    assert time.monotonic() - began > 0.05


def test_nobody_waits_when_all_is_over() -> None:
    limiter = Limiter(1_000)
    limiter.wait(1_000_000)
    over = threading.Event()
    threading.Timer(0.1, over.set).start()
    began = time.monotonic()
    limiter.wait(1, over.is_set)
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(("rate", "piece"), [(1_000, 4096), (1_000_000, 250_000), (1e12, 1 << 20)])
def test_pieces_are_small_where_the_rate_is(rate: float, piece: int) -> None:
    assert Limiter(rate).piece_bytes(1 << 20) == piece
