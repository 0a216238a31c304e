# SPDX-License-Identifier: Apache-2.0
"""A user's word names one image, or is refused with a hint."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oci.reference import LayoutReference, RegistryReference, parse
from rekindle.errors import UsageError

GOOD = {
    "llama": "llama:latest",
    "llama:8b": "llama:8b",
    "a": "a:latest",
    "0": "0:latest",
    "team/llama": "team/llama:latest",
    "team/sub/llama:V1.2_x-y": "team/sub/llama:V1.2_x-y",
    "a-b.c_d__e": "a-b.c_d__e:latest",
    "a--b": "a--b:latest",
    "x:" + "t" * 128: "x:" + "t" * 128,
    "x:_": "x:_",
    "localhost": "localhost:latest",
    "oci": "oci:latest",
    "v1.0": "v1.0:latest",
}


@pytest.mark.parametrize(("text", "tag"), GOOD.items())
def test_a_name_is_in_the_store(text: str, tag: str) -> None:
    reference = parse(text)
    assert isinstance(reference, LayoutReference)
    assert (reference.directory, reference.tag) == (None, tag)
    assert str(reference) == text


@pytest.mark.parametrize(
    "text",
    [
        *("", ":", ":tag", "x:", "x:-tag", "x:.tag", "x:a/b", "x:a:b", "x:" + "t" * 129, "x:é", "x:a b"),
        *("Llama", "a b", "a/", "/a", "a//b", "a/../b", "..", ".", "-a", "a-", "a.", "a..b", "a___b", "_a"),
        *("é", "a\n", "a\0", "x:tag\n", "a/-b", "oci:", "oci::tag", "~/x", "x@sha256:0"),
    ],
)
def test_no_name_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


DIGEST = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("text", "host", "repository", "tag", "digest"),
    [
        ("ghcr.io/team/llama", "ghcr.io", "team/llama", "latest", None),
        ("ghcr.io/team/llama:8b", "ghcr.io", "team/llama", "8b", None),
        ("localhost/llama", "localhost", "llama", "latest", None),
        ("localhost:5000/llama", "localhost:5000", "llama", "latest", None),
        ("registry:5000/llama:8b", "registry:5000", "llama", "8b", None),
        ("127.0.0.1:5000/llama", "127.0.0.1:5000", "llama", "latest", None),
        ("[::1]:5000/a/b", "[::1]:5000", "a/b", "latest", None),
        (f"ghcr.io/team/llama@{DIGEST}", "ghcr.io", "team/llama", "latest", DIGEST),
        (f"ghcr.io/team/llama:8b@{DIGEST}", "ghcr.io", "team/llama", "8b", DIGEST),
        ("docker.io/vllm", "docker.io", "library/vllm", "latest", None),
    ],
)
def test_what_begins_with_a_host_is_in_a_registry(
    text: str, host: str, repository: str, tag: str, digest: str | None
) -> None:
    reference = parse(text)
    assert isinstance(reference, RegistryReference)
    assert (reference.host, reference.repository, reference.tag) == (host, repository, tag)
    assert reference.digest == digest
    assert str(reference) == text


def test_docker_io_is_answered_for_by_another_host() -> None:
    reference = parse("docker.io/vllm/vllm-openai")
    assert isinstance(reference, RegistryReference)
    assert reference.api_host == "registry-1.docker.io"


@pytest.mark.parametrize(
    "text",
    [
        *("ghcr.io/", "ghcr.io/Team/llama", "ghcr.io/a:b:c", "ghcr.io/a:", "ghcr.io/a b", "ghcr.io//a"),
        *("ghcr.io/a/../b", "ghcr.io/a@", "ghcr.io/a@sha256:0", f"ghcr.io/a@{DIGEST.upper()}", "a.b/x?y"),
        *("h:0/a", "h:99999/a", "h:x/a", "user@h:5/a", "http://h:5/a", "h:5/" + "a" * 256, "-h.x/a"),
        *("h.x/a@sha512:" + "0" * 128, "h.x\n/a", "[::1/a", "h..x:5 /a"),
    ],
)
def test_no_image_of_a_registry_is_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert caught.value.hint or caught.value.cause


@pytest.mark.parametrize(
    ("text", "directory", "tag"),
    [
        ("oci:/srv/images", "/srv/images", "latest"),
        ("oci:/srv/images:8b", "/srv/images", "8b"),
        ("oci:/srv/a b/é:v1", "/srv/a b/é", "v1"),
        ("oci:/srv/images:", "/srv/images", "latest"),
    ],
)
def test_a_directory_is_a_layout(text: str, directory: str, tag: str) -> None:
    reference = parse(text)
    assert isinstance(reference, LayoutReference)
    assert (reference.directory, reference.tag) == (Path(directory), tag)
    assert str(reference) == text


def test_a_relative_directory_is_below_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reference = parse("oci:images")
    assert isinstance(reference, LayoutReference)
    assert reference.directory == tmp_path / "images"


@pytest.mark.parametrize(
    "text", ["oci:/srv:a/b", "oci:/srv:a:b", "oci:/srv:-x", "oci:/srv:é", "oci:/srv:" + "t" * 129]
)
def test_a_layout_with_a_bad_tag_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="invalid image name") as caught:
        parse(text)
    assert "oci:DIR" in caught.value.hint


@given(st.text(alphabet="ab0A._-:/@ \n", max_size=12) | st.text(max_size=12))
def test_a_tag_in_the_store_has_one_form(text: str) -> None:
    try:
        reference = parse(text)
    except UsageError:
        return
    if isinstance(reference, LayoutReference) and reference.directory is None:
        name, _, tag = reference.tag.partition(":")
        assert parse(f"{name}:{tag}") == type(reference)(
            text=reference.tag, directory=None, tag=reference.tag
        )
        assert not {"..", ".", ""} & set(name.split("/"))
