# SPDX-License-Identifier: Apache-2.0
"""Anybody may attach anything to an image: what is no signature of it is passed over."""

import dataclasses
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from oci import media_types
from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.trust import attachments, bundle
from oci.trust.bundle import Bundle, SimpleSignature
from oci.trust.keys import PrivateKey
from oci.trust.statement import COSIGN_SIGN, Statement
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import FormatError, IntegrityError, NotFoundError, RegistryError, RekindleError

KEY = PrivateKey.generate()
LIMITS = Limits()
EMPTY = "application/vnd.oci.empty.v1+json"


@dataclasses.dataclass
class Blobs:
    """Blobs in memory, whose list of referrers is what the test says."""

    blobs: dict[Digest, bytes] = dataclasses.field(default_factory=dict)
    listed: list[Descriptor] = dataclasses.field(default_factory=list)
    errors: dict[Digest, RekindleError] = dataclasses.field(default_factory=dict)
    reads: list[Digest] = dataclasses.field(default_factory=list)

    def put(self, content: bytes, media_type: str) -> Descriptor:
        digest = Digest.of_bytes(content)
        self.blobs[digest] = content
        return Descriptor(media_type=media_type, digest=digest, size=len(content))

    def read(self, descriptor: Descriptor, *, limit_bytes: int) -> bytes:
        self.reads.append(descriptor.digest)
        if error := self.errors.get(descriptor.digest):
            raise error
        if descriptor.size > limit_bytes:
            raise FormatError("more than is sane")
        if descriptor.digest not in self.blobs:
            raise NotFoundError("it is not there")
        if len(self.blobs[descriptor.digest]) != descriptor.size:
            raise IntegrityError("it has another size")
        return self.blobs[descriptor.digest]

    def open_blob(self, descriptor: Descriptor) -> io.RawIOBase:
        raise AssertionError("nothing is read unchecked")

    def referrers(self, digest: Digest, *, artifact_type: str = "") -> list[Descriptor]:
        return self.listed

    def cancel(self) -> None: ...

    def fall_back_to_origin(self) -> bool:
        return False

    def attach(self, about: Descriptor, content: bytes, /, **changes: Any) -> Descriptor:
        """A manifest around a bundle, with some of its fields changed or (None) left out."""
        layer = self.put(content, bundle.MEDIA_TYPE)
        manifest = {
            "schemaVersion": 2,
            "mediaType": media_types.MANIFEST,
            "config": self.put(b"{}", EMPTY).to_json(),
            "layers": [layer.to_json()],
            "subject": about.to_json(),
        }
        manifest = {name: value for name, value in {**manifest, **changes}.items() if value is not None}
        descriptor = self.put(json.dumps(manifest).encode(), media_types.MANIFEST)
        self.listed.append(descriptor)
        return descriptor


@pytest.fixture
def source() -> Blobs:
    return Blobs()


@pytest.fixture
def image(source: Blobs) -> Descriptor:
    return source.put(b'{"manifests": []}', media_types.INDEX)


def signed(image: Descriptor) -> Bundle:
    return Bundle.sign(Statement(subject=image.digest, predicate_type=COSIGN_SIGN, predicate={}), KEY)


def found(source: Any, image: Descriptor, failures: list[RekindleError] | None = None) -> list[Bundle]:
    return list(attachments.find(source, image.digest, LIMITS, [] if failures is None else failures))


def test_what_is_stored_is_found_again(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path)
    subject = structs.replace(
        layout.put(b'{"manifests": []}', media_types.INDEX), annotations={"private": "x"}
    )
    made = attachments.store(layout, subject, signed(subject), COSIGN_SIGN)
    layout.attach(layout, [made])
    assert found(layout, subject) == [signed_again(layout, made)]
    manifest = json.loads(layout.read(made, limit_bytes=1 << 20))
    assert manifest["subject"] == {
        "mediaType": media_types.INDEX,
        "digest": subject.digest,
        "size": subject.size,
    }
    assert manifest["artifactType"] == made.artifact_type == bundle.MEDIA_TYPE
    assert manifest["annotations"]["dev.sigstore.bundle.predicateType"] == COSIGN_SIGN


def signed_again(layout: Layout, made: Descriptor) -> Bundle:
    """The bundle by way of its bytes."""
    manifest = json.loads(layout.read(made, limit_bytes=1 << 20))
    layer = Descriptor.from_json(manifest["layers"][0], "layer")
    return Bundle.parse(layout.read(layer, limit_bytes=1 << 20))


def test_it_does_not_matter_what_the_list_calls_a_bundle(source: Blobs, image: Descriptor) -> None:
    source.attach(image, signed(image).content)
    source.listed = [structs.replace(each, artifact_type=EMPTY) for each in source.listed]
    assert len(found(source, image)) == 1


LAYER = {"mediaType": bundle.MEDIA_TYPE, "digest": f"sha256:{'0' * 64}", "size": 5}
MALFORMED: Mapping[str, dict[str, Any]] = {
    "no subject": {"subject": None},
    "a subject that is no object": {"subject": "x"},
    "a subject without a digest": {"subject": {}},
    "a subject whose digest is a number": {"subject": {"digest": 5}},
    "another subject": {"subject": {"digest": f"sha256:{'1' * 64}"}},
    "no layers": {"layers": None},
    "an empty list of layers": {"layers": []},
    "two layers": {"layers": [LAYER, LAYER]},
    "a layer that is not there": {"layers": [LAYER]},
    "a layer of another type": {"layers": [{**LAYER, "mediaType": "application/json"}]},
    "a layer that is larger than is sane": {"layers": [{**LAYER, "size": bundle.LIMIT_BYTES + 1}]},
    "a layer whose size is no number": {"layers": [{**LAYER, "size": "5"}]},
    "a layer of a foreign digest": {"layers": [{**LAYER, "digest": "md5:00"}]},
    "layers that are an object": {"layers": {}},
}


@pytest.mark.parametrize("changes", MALFORMED.values(), ids=MALFORMED)
def test_a_manifest_that_is_malformed_is_passed_over(
    source: Blobs, image: Descriptor, changes: dict[str, Any]
) -> None:
    source.attach(image, b"one that is not read", **changes)
    assert found(source, image) == []
    source.attach(image, signed(image).content)
    assert len(found(source, image)) == 1, "what comes after it is found"


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"\xff", b"{}", b"[" * 100_000, b'{"subject": 1e999}', b"9" * 5000]
)
def test_what_is_no_manifest_or_no_bundle_is_passed_over(
    source: Blobs, image: Descriptor, content: bytes
) -> None:
    source.listed.append(source.put(content, media_types.MANIFEST))
    source.attach(image, content)
    source.attach(image, signed(image).content)
    assert len(found(source, image)) == 1


@pytest.mark.parametrize("error", [FormatError("x"), IntegrityError("x"), NotFoundError("x")])
def test_what_cannot_be_read_is_passed_over(source: Blobs, image: Descriptor, error: RekindleError) -> None:
    broken = source.attach(image, signed(image).content, annotations={"a": "b"})
    source.errors[broken.digest] = error
    source.attach(image, signed(image).content)
    assert len(found(source, image)) == 1


def test_a_registry_that_fails_is_not_passed_over(source: Blobs, image: Descriptor) -> None:
    """Else it would seem that nobody has signed."""
    broken = source.attach(image, signed(image).content, annotations={"a": "b"})
    source.errors[broken.digest] = RegistryError("x")
    source.attach(image, signed(image).content)
    failures: list[RekindleError] = []
    assert len(found(source, image, failures)) == 1, "what comes after it is found"
    assert failures == [source.errors[broken.digest]]


def test_a_bundle_of_any_length_is_not_read(source: Blobs, image: Descriptor) -> None:
    source.attach(image, bytes(bundle.LIMIT_BYTES + 1))
    huge = source.put(bytes(5 << 20), media_types.MANIFEST)
    source.listed.append(huge)
    assert found(source, image) == []


def test_no_more_than_is_sane_are_looked_at_and_that_is_said(
    source: Blobs, image: Descriptor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attachments, "LIMIT", 100)
    for number in range(99):
        source.attach(image, signed(image).content, annotations={"n": str(number)})
    source.listed = source.listed * 3
    source.reads.clear()
    failures: list[RekindleError] = []
    assert len(found(source, image, failures)) == 100
    assert len(source.reads) == 200
    assert "the first 100 were read" in failures[0].cause


def test_signatures_are_read_before_statements_of_other_kinds(source: Blobs, image: Descriptor) -> None:
    for number in range(300):
        source.attach(image, signed(image).content, annotations={"n": str(number)})
    reports = [
        structs.replace(each, annotations={media_types.PREDICATE: "https://slsa.dev/provenance/v1"})
        for each in source.listed
    ]
    ours = source.attach(image, signed(image).content)
    source.listed = [*reports, structs.replace(ours, annotations={media_types.PREDICATE: COSIGN_SIGN})]
    source.reads.clear()
    find = attachments.find(source, image.digest, LIMITS, [], is_enough=lambda: True)
    assert len(list(find)) == 1
    assert len(source.reads) == 2
    assert len(found(source, image)) == 301, "what the list calls a report may be a signature"


def test_they_are_read_one_after_the_other(source: Blobs, image: Descriptor) -> None:
    for number in range(5):
        source.attach(image, signed(image).content, annotations={"n": str(number)})
    assert next(attachments.find(source, image.digest, LIMITS, []))
    assert len(source.reads) == 2


# Older signatures.


def simple(source: Blobs, *layers: dict[str, Any], **changes: Any) -> Descriptor:
    manifest = {"schemaVersion": 2, "layers": list(layers), **changes}
    return source.put(json.dumps(manifest).encode(), media_types.MANIFEST)


def layer(source: Blobs, payload: bytes, signature: str, media_type: str = "") -> dict[str, Any]:
    stored = source.put(payload, media_type or bundle.SIMPLE_MEDIA_TYPE).to_json()
    return {**stored, "annotations": {"dev.cosignproject.cosign/signature": signature}}


def older(source: Any, descriptor: Descriptor, failures: list[RekindleError] | None = None) -> list[bytes]:
    into = [] if failures is None else failures
    return [each.signature for each in attachments.find_simple(source, descriptor, LIMITS, into)]


def test_older_signatures_are_found_again(tmp_path: Path) -> None:
    layout = Layout.create(tmp_path)
    made = [SimpleSignature.sign(Digest.of_bytes(bytes([n])), "x", KEY) for n in range(3)]
    descriptor = attachments.store_simple(layout, made)
    assert list(attachments.find_simple(layout, descriptor, LIMITS, [])) == made[::-1]
    manifest = json.loads(layout.read(descriptor, limit_bytes=1 << 20))
    config = Descriptor.from_json(manifest["config"], "config")
    diff_ids = json.loads(layout.read(config, limit_bytes=1 << 20))["rootfs"]["diff_ids"]
    assert diff_ids == [each["digest"] for each in manifest["layers"]]


def test_layers_that_are_no_older_signature_are_passed_over(source: Blobs) -> None:
    good = layer(source, b"payload", "AAAA")
    others = [
        layer(source, b"payload", "AAAA", "application/json"),
        layer(source, b"payload", ""),
        layer(source, b"payload", "not base64"),
        layer(source, b"payload", "ä"),
        {**good, "annotations": {}},
        {**good, "digest": f"sha256:{'0' * 64}"},
        {**good, "size": bundle.LIMIT_BYTES + 1},
    ]
    odd: list[Any] = [None, 5, {"digest": "sha512:00"}]
    assert older(source, simple(source, *odd, *others, good)) == [b"\0\0\0"]


@pytest.mark.parametrize(
    "content", [b"", b"null", b"{}", b'{"layers": [5]}', b'{"layers": {}}', b"[" * 100_000]
)
def test_what_is_no_image_under_the_older_tag_holds_none(source: Blobs, content: bytes) -> None:
    assert older(source, source.put(content, media_types.MANIFEST)) == []


def test_the_newest_of_too_many_older_signatures_are_read_and_that_is_said(source: Blobs) -> None:
    reports = [layer(source, b"payload", "AAAA", "application/json")] * 1000
    good = [layer(source, bytes([n // 256, n % 256]), f"{n:04}") for n in range(501)]
    failures: list[RekindleError] = []
    assert len(older(source, simple(source, *reports, *good[1:]), failures)) == 500
    assert not failures
    found = older(source, simple(source, *good), failures)
    assert (len(found), found[0]) == (500, older(source, simple(source, good[-1]))[0])
    assert "501 may be signatures; the first 500 were read" in failures[0].cause


def test_an_image_under_the_older_tag_that_cannot_be_read(source: Blobs) -> None:
    there = simple(source)
    assert older(source, structs.replace(there, size=5)) == []
    assert older(source, structs.replace(there, digest=Digest.of_bytes(b"x"))) == []
    assert older(source, structs.replace(there, size=1 << 40)) == []


# Anything at all.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(
    fields=st.dictionaries(
        st.sampled_from(["subject", "layers", "config", "annotations", "manifests"]), JSON
    ),
    content=st.binary(max_size=50) | JSON.map(lambda value: json.dumps(value).encode()),
)
def test_nothing_that_is_attached_breaks_the_search(fields: dict[str, Any], content: bytes) -> None:
    source = Blobs()
    image = source.put(b"{}", media_types.INDEX)
    source.attach(image, content, **fields)
    source.attach(image, content)
    source.listed.append(source.put(content, media_types.MANIFEST))
    source.attach(image, signed(image).content)
    assert len(found(source, image)) == 1
    assert older(source, source.put(content, media_types.MANIFEST)) == []
