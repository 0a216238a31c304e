# SPDX-License-Identifier: Apache-2.0
"""Kernel caches through oras-py, the client that Python programs use for artifacts in registries."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import Rekindle
from tests.samples.cache import KEY, triton
from tests.servers.registry.docker_registry import DockerRegistry

pytestmark = pytest.mark.registry

# In a process of its own: it configures logging and warnings for itself.
CLIENT = """
import json, sys
from oras.client import OrasClient
client = OrasClient(insecure=True)
verb, image, directory = sys.argv[1:]
if verb == "pull":
    files = client.pull(target=image, outdir=directory)
    print(json.dumps({"files": files, "manifest": client.get_manifest(image)}))
else:
    client.push(target=image, files=[directory + "/kernels.tar.gz"], disable_path_validation=True)
"""


def client(verb: str, image: str, directory: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CLIENT, verb, image, str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_pulls_a_kernel_cache_as_files(
    rekindle: Rekindle, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    import oras.schemas  # takes a fifth of a second

    triton(tmp_path / "cache")
    assert rekindle("pack-cache", "kernels", "--dir", str(tmp_path / "cache")).status == 0
    image = f"{docker_registry.host}/team/kernels:1"
    assert rekindle("push", "kernels", image).status == 0
    found: dict[str, Any] = json.loads(client("pull", image, tmp_path / "out"))
    jsonschema.validate(found["manifest"], oras.schemas.manifest)
    titles = [layer["annotations"]["org.opencontainers.image.title"] for layer in found["manifest"]["layers"]]
    assert {Path(file).name for file in found["files"]} >= set(titles)
    # It unpacks archives.
    (kernel,) = (tmp_path / "out").rglob(f"{KEY}/add.cubin")
    assert kernel.read_bytes() == (tmp_path / "cache" / KEY / "add.cubin").read_bytes()


def test_what_it_pushes_is_copied_with_its_digest(
    rekindle: Rekindle, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    (tmp_path / "kernels.tar.gz").write_bytes(b"not ours to look at")
    image = f"{docker_registry.host}/team/others:1"
    client("push", image, tmp_path)
    done = rekindle("copy", image, f"oci:{tmp_path}/layout:1", "--json")
    assert done.status == 0, done.stderr
    digest = done.json["image"]["digest"].removeprefix("sha256:")
    assert (tmp_path / "layout/blobs/sha256" / digest).exists()
