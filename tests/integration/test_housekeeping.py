# SPDX-License-Identifier: Apache-2.0
"""`rekindle list`, `rm`, `prune` and `tags` from outside; `inspect` says who signed."""

import json
import os
from pathlib import Path

import pytest

from tests.conftest import KeyPair, Rekindle
from tests.samples.cache import triton, write
from tests.servers.registry.docker_registry import DockerRegistry


def test_images_are_listed_and_removed(rekindle: Rekindle, tmp_path: Path) -> None:
    assert rekindle("list").stdout.split() == ["KIND", "NAME", "DIGEST", "SIZE", "USED", "STATE"]
    triton(tmp_path / "t")
    for name in ("one", "two:x"):
        write(tmp_path / "t/KEY" / name.replace(":", "-"), os.urandom(1000))
        assert rekindle("pack-cache", name, "--dir", str(tmp_path / "t")).status == 0
    done = rekindle("list", "--json")
    assert [(each["kind"], each["in_use"]) for each in done.json["kept"]] == [("image", False)] * 2
    assert sorted(rekindle("list", "-q").stdout.split()) == ["one:latest", "two:x"]
    assert rekindle("rm", "nobody").status == rekindle("rm", "one", "nobody").status != 0
    assert rekindle("list", "-q").stdout.split() == ["two:x"]
    assert rekindle("prune", "--images").status == 2
    assert rekindle("prune", "--images", "--older-than", "1d").stdout == "0 removed, 0 MB\n"
    assert rekindle("prune", "--images", "--older-than", "soon").status == 2
    assert rekindle("rm", "two:x").status == 0
    assert os.listdir(rekindle.home / "store/blobs/sha256") == []
    assert rekindle("rm", "registry.example.com/a/b:1").status == 2


def test_a_layout_directory_keeps_only_what_its_tags_need(rekindle: Rekindle, tmp_path: Path) -> None:
    image, triton_cache = f"oci:{tmp_path}/mine:1", tmp_path / "t"
    sizes = []
    for _ in range(3):
        triton(triton_cache)
        write(triton_cache / "KEY/x", os.urandom(100_000))
        assert rekindle("pack-cache", image, "--dir", str(triton_cache)).status == 0
        sizes.append(len(os.listdir(tmp_path / "mine/blobs/sha256")))
    assert len(set(sizes)) == 1
    assert rekindle("tags", f"oci:{tmp_path}/mine").stdout == "1\n"
    assert rekindle("rm", image).status == 0
    assert os.listdir(tmp_path / "mine/blobs/sha256") == []
    (tmp_path / "mine").chmod(0o755)
    assert rekindle("pack-cache", "kernels", "--dir", str(triton_cache)).status == 0
    assert "others can read" in rekindle("copy", "kernels", image).stderr


@pytest.mark.registry
def test_tags_of_a_repository_are_listed_without_those_of_signatures(
    rekindle: Rekindle, key_pair: KeyPair, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    triton(tmp_path / "t")
    assert rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "t"), *key_pair.sign).status == 0
    where = f"{docker_registry.host}/models/tiny"
    for tag in ("2", "1"):
        assert rekindle("copy", "kernels", f"{where}:{tag}").status == 0
    assert rekindle("tags", where).stdout == "1\n2\n"
    assert json.loads(rekindle("tags", where, "--json").stdout)["tags"] == ["1", "2"]
    assert rekindle("tags", f"{docker_registry.host}/nothing").status == 12
    inspected = rekindle("inspect", f"{where}:1", *key_pair.verify)
    assert "signed by   " in inspected.stdout
    assert "not verified" not in inspected.stdout
    assert "signed by   not verified: " in rekindle("inspect", f"{where}:1").stdout
    signed = json.loads(rekindle("inspect", f"{where}:1", "--json", *key_pair.verify).stdout)["signed"]
    assert signed["verified"] is True
    assert signed["by"]
