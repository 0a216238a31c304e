# SPDX-License-Identifier: Apache-2.0
"""`rekindle sign`: what it asks of the user."""

import getpass
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cli import copy, pack_cache, sign, verify
from oci.cache import image as cache_image
from oci.cache import pack
from oci.cosign_tags import SIGNATURES, tag_of
from oci.layout import Layout
from oci.trust.keys import PrivateKey
from rekindle.config import Limits
from rekindle.digest import Digest
from rekindle.errors import UsageError
from tests.samples.cache import CREATED, triton
from tests.servers.registry.simulator import Registry


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a user who knows the password was asked."""
    questions: list[str] = []

    def answer(question: str) -> str:
        questions.append(question)
        return "sesame"

    monkeypatch.delenv("COSIGN_PASSWORD", raising=False)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(getpass, "getpass", answer)
    return questions


def serve_cache(registry: Registry, place: Path) -> Digest:
    """The digest of a kernel cache that is now in a registry."""
    layout = Layout.create(place / "layout")
    image = cache_image.load(layout, pack.pack([triton(place / "t")], layout, created=CREATED), Limits())
    for each in (image.config, *image.layers):
        registry.add_blob("a/b", layout.read(each, limit_bytes=1 << 20))
    content = layout.read(image.manifest, limit_bytes=1 << 20)
    registry.add_manifest("a/b", content, "1", image.manifest.media_type)
    return image.manifest.digest


def test_the_password_is_asked_for_once_whatever_the_forms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    PrivateKey.generate().write(tmp_path / "cosign.key", b"sesame")
    with Registry() as registry:
        digest = serve_cache(registry, tmp_path)
        words = [f"{registry.host}/a/b@{digest}", "--sign-key", str(tmp_path / "cosign.key"), "--legacy-tag"]
        assert sign.main([*words, "--quiet"]) == 0
        assert tag_of(digest, SIGNATURES) in registry.repositories["a/b"].tags
    assert len(asked) == 1


def test_a_tag_is_shown_and_its_digest_demanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COSIGN_PASSWORD", "")
    PrivateKey.generate().write(tmp_path / "cosign.key", b"")
    with Registry() as registry:
        digest = serve_cache(registry, tmp_path)
        words = [f"{registry.host}/a/b:1", "--sign-key", str(tmp_path / "cosign.key"), "--quiet"]
        with pytest.raises(UsageError, match=digest) as caught:
            sign.main(words)
        assert f"{registry.host}/a/b@{digest}" in caught.value.hint
        assert not registry.uploads()
        assert sign.main([*words, "--yes-by-tag"]) == 0
        assert registry.uploads()


def test_a_tag_of_what_this_machine_has_made_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COSIGN_PASSWORD", "")
    PrivateKey.generate().write(tmp_path / "cosign.key", b"")
    with Registry() as registry:
        assert pack_cache.main(["mine", "--dir", str(triton(tmp_path / "t").path), "--quiet"]) == 0
        assert copy.main(["mine", f"{registry.host}/a/b:1", "--quiet"]) == 0
        words = [f"{registry.host}/a/b:1", "--sign-key", str(tmp_path / "cosign.key"), "--quiet"]
        assert sign.main(words) == 0
        other = serve_cache(registry, tmp_path / "other")  # somebody moves the tag
        with pytest.raises(UsageError, match=other):
            sign.main(words)


def test_a_command_signs_in_both_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REKINDLE_HOME", str(tmp_path / "home"))
    key = PrivateKey.generate("p-384")
    (tmp_path / "key.pem").write_bytes(key.to_pem())
    (tmp_path / "key.pub").write_bytes(key.public.to_pem())
    by_command = ["--sign-command", f"openssl dgst -sha256 -sign '{tmp_path}/key.pem'"]
    public = ["--sign-public-key", str(tmp_path / "key.pub")]
    with Registry() as registry:
        digest = serve_cache(registry, tmp_path)
        words = [f"{registry.host}/a/b@{digest}", "--quiet", "--legacy-tag", *by_command]
        with pytest.raises(UsageError, match="required together"):
            sign.main(words)
        with pytest.raises(UsageError, match="cannot be combined"):
            sign.main([*words, *public, "--sign-keyless"])
        assert sign.main([*words, *public]) == 0
        assert tag_of(digest, SIGNATURES) in registry.repositories["a/b"].tags
        trust = ["--verify-key", str(tmp_path / "key.pub")]
        assert verify.main([f"{registry.host}/a/b:1", *trust]) == 0
