# SPDX-License-Identifier: Apache-2.0
"""What other tools attach to an image goes with every copy of it, between registries of two makes."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import COSIGN, COSIGN_2, CRANE, GO_REGISTRY, ORAS, SKOPEO, KeyPair, Rekindle, need
from tests.samples.cache import triton
from tests.servers.registry.docker_registry import DockerRegistry
from tests.servers.registry.go_registry import GoRegistry

pytestmark = pytest.mark.registry

INSECURE = ["--allow-insecure-registry", "--allow-http-registry"]
LOCALLY = ["--insecure-ignore-tlog=true", *INSECURE]
SIGN = ["--tlog-upload=false", "-y", *INSECURE]


@dataclass(frozen=True, slots=True)
class Shop:
    """A registry with an image, another registry, and the tools of others."""

    rekindle: Rekindle
    here: str
    there: str
    digest: str
    keys: KeyPair

    def run(self, program: Path, *words: str | Path) -> str:
        home = str(self.keys.prefix.parent)
        done = subprocess.run(
            [str(program), *map(str, words)],
            env={**os.environ, "COSIGN_PASSWORD": "", "HOME": home, "SIGSTORE_NO_CACHE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def copy(self, source: str, target: str) -> list[dict[str, Any]]:
        done = self.rekindle("copy", source, target, "--json")
        assert done.status == 0, done.stderr
        results: list[dict[str, Any]] = done.json["attachments"]
        assert all(each["copied"] for each in results), results
        return results


CRANE_SERVES = [CRANE, "registry", "serve", "--address"]
WITH_REFERRERS = [GO_REGISTRY]


@pytest.fixture(
    params=[
        pytest.param((CRANE_SERVES, False), id="to crane's"),
        pytest.param((CRANE_SERVES, True), id="from crane's"),
        pytest.param((WITH_REFERRERS, False), id="to one with the referrers API"),
        pytest.param((WITH_REFERRERS, True), id="from one with the referrers API"),
    ]
)
def shop(
    request: pytest.FixtureRequest,
    rekindle: Rekindle,
    key_pair: KeyPair,
    docker_registry: DockerRegistry,
    tmp_path: Path,
) -> Iterator[Shop]:
    command, is_source = request.param
    need(command[0].exists(), "a registry in Go", "hack/get-go-registry makes it")
    with GoRegistry(command, tmp_path / "go-registry") as go_registry:
        hosts = docker_registry.host, go_registry.host
        yield open_shop(rekindle, key_pair, tmp_path, *(hosts[::-1] if is_source else hosts))


def open_shop(rekindle: Rekindle, key_pair: KeyPair, tmp_path: Path, here: str, there: str) -> Shop:
    triton(tmp_path / "kernels")
    assert rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "kernels")).status == 0
    done = rekindle("push", "kernels", f"{here}/team/kernels:1", "--json")
    assert done.status == 0, done.stderr
    digest = done.json["image"]["digest"]
    return Shop(rekindle, f"{here}/team/kernels", f"{there}/team/kernels", digest, key_pair)


def test_what_cosign_2_stores_under_tags_goes_with_a_copy(shop: Shop, tmp_path: Path) -> None:
    image, key = f"{shop.here}@{shop.digest}", f"{shop.keys.prefix}.key"
    (tmp_path / "sbom.json").write_text('{"spdxVersion": "SPDX-2.3"}')
    predicate = ["--predicate", f"{tmp_path}/sbom.json"]
    for kind in ("spdxjson", "custom"):
        shop.run(COSIGN_2, "attest", "--key", key, "--type", kind, *predicate, *SIGN, image)
    shop.run(COSIGN_2, "attach", "sbom", "--sbom", tmp_path / "sbom.json", "--type", "spdx", *INSECURE, image)
    tag = f"{shop.digest.replace(':', '-')}.sbom"
    sbom = shop.run(CRANE, "digest", "--insecure", f"{shop.here}:{tag}").strip()
    shop.run(COSIGN_2, "sign", "--key", key, *SIGN, f"{shop.here}@{sbom}")

    layout = f"oci:{tmp_path}/layout:1"
    shop.copy(image, layout)
    results = shop.copy(layout, f"{shop.there}:1")
    assert {each["artifact_type"] for each in results} == {
        "application/vnd.dsse.envelope.v1+json",
        "application/vnd.dev.cosign.simplesigning.v1+json",
        "text/spdx+json",
    }
    # Every tag but that of the image itself, and each names the same manifest.
    tags = [tag for tag in shop.run(CRANE, "ls", "--insecure", shop.here).split() if tag != "1"]
    assert len(tags) == 3
    for tag in tags:
        digests = [
            shop.run(CRANE, "digest", "--insecure", f"{each}:{tag}") for each in (shop.here, shop.there)
        ]
        assert digests[0] == digests[1]
    public = ["--key", f"{shop.keys.prefix}.pub", *LOCALLY]
    for kind in ("spdxjson", "custom"):
        shop.run(COSIGN_2, "verify-attestation", "--type", kind, *public, f"{shop.there}@{shop.digest}")
    shop.run(COSIGN_2, "verify", *public, f"{shop.there}@{sbom}")
    given = shop.run(COSIGN_2, "download", "sbom", *INSECURE, f"{shop.there}@{shop.digest}")
    assert json.loads(given) == {"spdxVersion": "SPDX-2.3"}

    # Others attest in both places, and another copy keeps all.
    shop.run(
        COSIGN_2,
        "attest",
        "--key",
        key,
        "--type",
        "https://x.example/there",
        *predicate,
        *SIGN,
        f"{shop.there}:1",
    )
    shop.run(COSIGN_2, "attest", "--key", key, "--type", "https://x.example/here", *predicate, *SIGN, image)
    shop.copy(image, f"{shop.there}:1")
    for kind in ("spdxjson", "custom", "https://x.example/there", "https://x.example/here"):
        shop.run(COSIGN_2, "verify-attestation", "--type", kind, *public, f"{shop.there}@{shop.digest}")


def test_attachments_of_attachments_go_with_a_copy(shop: Shop, tmp_path: Path) -> None:
    image, key = f"{shop.here}@{shop.digest}", f"{shop.keys.prefix}.key"
    (tmp_path / "report.json").write_text("{}")

    def attach(to: str) -> str:
        words = ["attach", "--plain-http", "--disable-path-validation", "--format", "json"]
        of = ["--artifact-type", "application/vnd.report", to, f"{tmp_path}/report.json:application/json"]
        return str(json.loads(shop.run(ORAS, *words, *of))["digest"])

    report = attach(image)
    signing = ["--use-signing-config=false", *SIGN]
    shop.run(COSIGN, "sign", "--key", key, *signing, f"{shop.here}@{report}")
    attach(f"{shop.here}@{attach(f'{shop.here}@{report}')}")

    def tree(repository: str) -> Any:
        """What refers to what, by digest: lists differ in what they say of a manifest."""

        def digests(node: Any) -> Any:
            return {each["digest"]: digests(each) for each in node.get("referrers", [])}

        words = ["discover", "--plain-http", "--format", "json", f"{repository}@{shop.digest}"]
        return digests(json.loads(shop.run(ORAS, *words)))

    layout = f"oci:{tmp_path}/layout:1"
    shop.copy(image, layout)
    shop.copy(layout, f"{shop.there}:1")
    assert tree(shop.there) == tree(shop.here)
    assert json.dumps(tree(shop.there)).count("sha256:") == 4
    shop.run(COSIGN, "verify", "--key", f"{shop.keys.prefix}.pub", *LOCALLY, f"{shop.there}@{report}")
    # The local store keeps them, too, until the image is removed.
    shop.copy(image, "mine")
    shop.copy("mine", f"{shop.there}-again:1")
    assert tree(f"{shop.there}-again") == tree(shop.here)
    assert shop.rekindle("rm", "mine", "kernels").status == 0
    assert shop.rekindle("prune").status == 0
    assert not list((shop.rekindle.home / "store/blobs/sha256").iterdir())


def test_layouts_as_others_write_them(
    rekindle: Rekindle, key_pair: KeyPair, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    """By `skopeo copy`, `crane pull` and `cosign save`, with one image and no tag."""
    shop = open_shop(rekindle, key_pair, tmp_path, docker_registry.host, f"{docker_registry.host}/other")
    image = f"{shop.here}@{shop.digest}"
    done = rekindle("sign", image, *key_pair.sign, "--legacy-tag")
    assert done.status == 0, done.stderr
    layouts = [f"{tmp_path}/{name}" for name in ("skopeo", "crane", "cosign")]
    skopeo = ["--insecure-policy", "copy", "--src-tls-verify=false"]
    shop.run(SKOPEO, *skopeo, f"docker://{image}", f"oci:{layouts[0]}")
    shop.run(CRANE, "pull", "--insecure", "--format=oci", image, layouts[1])
    shop.run(COSIGN_2, "save", "--dir", layouts[2], *INSECURE, image)
    for number, layout in enumerate(layouts):
        done = rekindle("copy", f"oci:{layout}", f"{shop.there}:{number}", "--json")
        assert done.status == 0, done.stderr
        assert done.json["image"]["digest"] == shop.digest
    # cosign alone brings signatures along.
    key = ["--key", f"{key_pair.prefix}.pub", *LOCALLY]
    shop.run(COSIGN_2, "verify", *key, f"{shop.there}@{shop.digest}")
    kind = "https://rekindle.dev/attestations/snapshot/v1"
    shop.run(COSIGN_2, "verify-attestation", "--type", kind, *key, f"{shop.there}@{shop.digest}")
    done = rekindle("verify", f"oci:{layouts[2]}", *key_pair.verify)
    assert (done.status, "made at an unknown time" in done.stdout) == (0, False), done.stderr
    assert rekindle("verify", f"oci:{layouts[0]}", *key_pair.verify).status == 22
