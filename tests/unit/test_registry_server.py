# SPDX-License-Identifier: Apache-2.0
"""The registries that other tests trust."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import CRANE, ORAS, SKOPEO
from tests.servers.registry.docker_registry import PASSWORD, USERNAME, Auth, DockerRegistry


def quietly(*words: object, where: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=where,
        env={"HOME": str(where)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.registry
@pytest.mark.parametrize("auth", Auth)
def test_the_real_registry_lets_in_who_has_the_password(
    auth: Auth, start_docker_registry: Callable[..., DockerRegistry], tmp_path: Path
) -> None:
    registry = start_docker_registry(auth)
    (tmp_path / "hello.txt").write_text("hello")
    flags = [] if auth is Auth.NONE else ["--username", USERNAME, "--password", PASSWORD]
    image = f"{registry.host}/a/b:1"
    quietly(ORAS, "push", "--plain-http", *flags, image, "hello.txt", where=tmp_path)
    assert '"layers"' in quietly(
        *(SKOPEO, "--insecure-policy", "inspect", "--raw", "--tls-verify=false"),
        *([] if auth is Auth.NONE else ["--creds", f"{USERNAME}:{PASSWORD}"]),
        f"docker://{image}",
        where=tmp_path,
    )
    if auth is Auth.NONE:
        assert quietly(CRANE, "ls", "--insecure", f"{registry.host}/a/b", where=tmp_path) == "1\n"
    assert "PUT /v2/a/b/manifests/1" in registry.log.read_text()
    assert (registry.storage / "docker/registry/v2/repositories/a/b").is_dir()


@pytest.mark.registry
@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
def test_the_real_registry_refuses_others(
    auth: Auth, start_docker_registry: Callable[..., DockerRegistry], tmp_path: Path
) -> None:
    registry = start_docker_registry(auth)
    (tmp_path / "hello.txt").write_text("hello")
    with pytest.raises(AssertionError, match=r"40[13]"):
        quietly(
            *(ORAS, "push", "--plain-http", "--username", USERNAME, "--password", "wrong"),
            *(f"{registry.host}/a/b:1", "hello.txt"),
            where=tmp_path,
        )
