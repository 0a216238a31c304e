# SPDX-License-Identifier: Apache-2.0
"""Where credentials are found, and what a user without a home directory is told."""

import base64
import json
from pathlib import Path

import pytest

from oci.registry import credentials
from oci.registry.credentials import Credentials
from oci.registry.host import Host
from oci.registry.transport import Connections
from oci.registry.url import Url
from rekindle.errors import CredentialsError
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.simulator import Registry


def write_credentials(path: Path, host: str) -> None:
    path.parent.mkdir(parents=True)
    auth = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))


@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
def test_a_user_without_a_home_is_told_to_set_docker_config(
    homeless: None, connections: Connections, auth: Auth
) -> None:
    with Registry(auth=auth) as registry:
        base = Url.parse(f"http://{registry.host}/")
        host = Host(base, connections, credentials.find, name=registry.host, login=registry.host)
        with pytest.raises(CredentialsError, match="refuses access") as caught:
            host.ask("GET", "a/r/manifests/1", scope="repository:a/r:pull", expected=frozenset({200}))
    assert "set DOCKER_CONFIG" in caught.value.hint


def test_a_user_without_a_home_reads_the_other_places(
    homeless: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Credentials(name=USERNAME, password=PASSWORD)
    assert credentials.find("registry.example") is None
    write_credentials(tmp_path / "run/containers/auth.json", "registry.example")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert credentials.find("registry.example") == right
    write_credentials(tmp_path / "docker/config.json", "docker.example")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert credentials.find("docker.example") == right


def test_the_advice_says_whether_there_are_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no credentials" in credentials.advise("registry.example", None)
    known = Credentials(name=USERNAME, password=PASSWORD)
    assert "other credentials" in credentials.advise("registry.example", known)
