# SPDX-License-Identifier: Apache-2.0
"""Credentials: in every form that docker, podman and Kubernetes write, and as we keep them."""

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli import login as login_command
from cli import logout as logout_command
from oci.registry import credentials, login
from oci.registry.credentials import HUB_KEY, Credentials
from oci.registry.host import Host
from oci.registry.transport import Connections
from oci.registry.url import Url
from rekindle.errors import CredentialsError, UsageError
from tests.samples.registry import access_to
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.simulator import Registry

RIGHT = Credentials(name=USERNAME, password=PASSWORD)
AUTH = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
ROBOT = Credentials(name="robot$t+x", password="p:w d")
REFRESH = Credentials(name="<token>", password="it", identity=True)
HOST = "registry.example:5000"


def write_credentials(path: Path, host: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"auths": {host: {"auth": AUTH}}}))


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration file of docker, which does not exist yet; no other file has credentials."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "docker").mkdir()
    return tmp_path / "docker" / "config.json"


def configure(docker: Path, **content: Any) -> None:
    docker.write_text(json.dumps(content))


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
    assert credentials.find("registry.example") is None
    write_credentials(tmp_path / "run/containers/auth.json", "registry.example")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    assert credentials.find("registry.example") == RIGHT
    write_credentials(tmp_path / "docker/config.json", "docker.example")
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    assert credentials.find("docker.example") == RIGHT


def test_the_advice_says_whether_there_are_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no credentials" in credentials.advise("registry.example", None)
    assert "other credentials" in credentials.advise("registry.example", RIGHT)


# Files.


def test_a_place_that_this_user_may_not_enter_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Podman run by root leaves a /run/containers that only root may enter."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000650000)
    monkeypatch.setattr(os, "access", lambda path, _: "/run/containers" not in str(path))
    assert not any("/run/containers" in str(path) for path in credentials.configurations())
    monkeypatch.setattr(os, "access", lambda *_: True)
    assert Path("/run/containers/1000650000/auth.json") in credentials.configurations()


def test_the_first_file_that_has_some_counts(
    docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [
        docker,
        docker.with_name(".dockerconfigjson"),
        tmp_path / "run/containers/auth.json",
        tmp_path / "home/.config/containers/auth.json",
    ]
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    for number, path in enumerate(places):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"auths": {HOST: {"username": f"user{number}", "password": "x"}}}))
    for number, path in enumerate(places):
        found = credentials.find(HOST)
        assert found is not None
        assert found.name == f"user{number}"
        path.unlink()
    assert credentials.find(HOST) is None
    docker.with_name(".dockercfg").write_text(json.dumps({HOST: {"auth": AUTH, "email": "a@b.c"}}))
    assert credentials.find(HOST) == RIGHT
    write_credentials(tmp_path / "auth.json", "another.example")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "auth.json"))
    assert credentials.find("another.example") == RIGHT


@pytest.mark.parametrize("content", ["auths:", "[]", '{"auths": []}', '{"auths": {"*": {}', "\0", "9" * 5000])
def test_a_file_that_cannot_be_read_is_an_error(docker: Path, content: str) -> None:
    docker.write_text(content)
    with pytest.raises(CredentialsError, match="cannot read the credentials") as caught:
        credentials.find(HOST)
    assert str(docker) in caught.value.message


# Keys.


@pytest.mark.parametrize(
    ("key", "where"),
    [
        (HOST, f"{HOST}/team/image"),
        (f"https://{HOST}", f"{HOST}/team/image"),
        (f"http://{HOST}/", f"{HOST}/team/image"),
        (f"https://{HOST}/v1/", f"{HOST}/team/image"),
        (f"{HOST}/v2/", f"{HOST}/team/image"),
        (f"{HOST}/team", f"{HOST}/team/image"),
        (f"{HOST}/team/image", f"{HOST}/team/image"),
        (f"{HOST}/other", f"{HOST}/team/image"),  # as docker and crane
        ("REGISTRY.example:5000", f"{HOST}/team/image"),
        ("*.example:5000", f"{HOST}/team/image"),
        (HUB_KEY, "registry-1.docker.io/library/image"),
        ("docker.io", "registry-1.docker.io/library/image"),
        ("index.docker.io", "registry-1.docker.io/library/image"),
        ("localhost:5000", "127.0.0.1:5000/image"),
        ("127.0.0.1:5000", "localhost:5000/image"),
    ],
)
def test_keys_are_taken_in_all_their_forms(docker: Path, key: str, where: str) -> None:
    configure(docker, auths={key: {"auth": AUTH}})
    assert credentials.find(where) == RIGHT


@pytest.mark.parametrize(
    "key",
    [
        "registry.example",
        "registry.example:5001",
        "evilregistry.example:5000",
        "registry.example:5000.evil",
        "*.example",
        "*:5000",
        "*.*.example:5000",
        "docker.io",
        "",
        "/",
        "https://",
    ],
)
def test_other_hosts_are_not_shown_the_password(docker: Path, key: str) -> None:
    configure(docker, auths={key: {"auth": AUTH}})
    assert credentials.find(f"{HOST}/team/image") is None


def test_the_key_that_fits_best_counts(docker: Path) -> None:
    keys = [
        f"{HOST}/team/image",
        f"{HOST}/team",
        HOST,
        f"https://{HOST}/v1/",
        "*.example:5000",
        f"{HOST}/team/im",
    ]
    auths = {key: {"username": key, "password": "x"} for key in reversed(keys)}
    for key in keys:
        configure(docker, auths=auths)
        found = credentials.find(f"{HOST}/team/image")
        assert found is not None
        assert found.name == key
        del auths[key]


# Entries.


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"auth": AUTH}, RIGHT),
        ({"auth": AUTH.rstrip("=")}, RIGHT),
        ({"username": USERNAME, "password": PASSWORD}, RIGHT),
        ({"username": USERNAME, "password": PASSWORD, "auth": None, "identitytoken": None}, RIGHT),
        ({"auth": AUTH, "username": "x", "password": "y"}, RIGHT),
        ({"auth": base64.b64encode(b"robot$t+x:p:w d\0\0").decode()}, ROBOT),
        ({"auth": AUTH, "identitytoken": "it"}, REFRESH),
        ({"registrytoken": "rt"}, Credentials(name="<token>", password="rt", is_bearer=True)),
        ({"username": "<token>", "password": "it"}, REFRESH),
        ({}, None),
        (None, None),
        ({"auth": ""}, None),
        ({"email": "a@b.c"}, None),
    ],
)
def test_entries_are_taken_in_all_their_forms(
    docker: Path, entry: object, expected: Credentials | None
) -> None:
    configure(docker, auths={HOST: entry}, credHelpers=None, credsStore=None)
    assert credentials.find(HOST) == expected


@pytest.mark.parametrize("entry", [5, [], {"auth": 5}, {"auth": "ä"}, {"auth": "AAAA"}, {"username": []}])
def test_an_entry_that_cannot_be_read_is_an_error_without_the_password(docker: Path, entry: object) -> None:
    configure(docker, auths={HOST: entry, "other.example": {"auth": AUTH}})
    with pytest.raises(CredentialsError) as caught:
        credentials.find(HOST)
    assert "AAAA" not in f"{caught.value.message}{caught.value.cause}"
    assert credentials.find("other.example") == RIGHT


def test_null_tables_are_none(docker: Path) -> None:
    configure(docker, auths=None, credHelpers=None, credsStore=None)
    assert credentials.find(HOST) is None


@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
def test_a_bearer_token_is_shown_as_it_is(connections: Connections, auth: Auth) -> None:
    given = Credentials(name="<token>", password="of-mine", is_bearer=True)
    with Registry(auth=auth) as registry:
        base = Url.parse(f"http://{registry.host}/")
        host = Host(base, connections, lambda _: given, name=registry.host, login=registry.host)
        with pytest.raises(CredentialsError):
            host.ask("GET", "a/r/manifests/1", scope="repository:a/r:pull", expected=frozenset({404}))
        assert registry.requests[-1].headers["authorization"] == "Bearer of-mine"
        assert len(registry.requests) == 2
        registry.tokens["of-mine"] = (frozenset({("a/r", "pull")}), float("inf"))
        if auth is Auth.TOKEN:
            host = Host(base, connections, lambda _: given, name=registry.host, login=registry.host)
            host.ask("GET", "a/r/manifests/1", scope="repository:a/r:pull", expected=frozenset({404})).close()


# Helpers.

MakeHelper = Callable[[str, str], None]


@pytest.fixture
def make_helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeHelper:
    """Makes a helper of this name from the lines of a shell script."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")

    def make(name: str, script: str) -> None:
        path = tmp_path / "bin" / f"docker-credential-{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return make


ANSWER = json.dumps({"ServerURL": "x", "Username": USERNAME, "Secret": PASSWORD})
KNOWS = f'test "$1" = get && test "$(cat)" = {HOST} && echo \'{ANSWER}\''
KNOWS_NOTHING = 'echo "credentials not found in native keychain"; exit 1'
INLINE = {HOST: {"username": "inline", "password": "x"}}


def test_a_helper_comes_before_what_is_written_down(docker: Path, make_helper: MakeHelper) -> None:
    make_helper("knows", KNOWS)
    make_helper("nothing", KNOWS_NOTHING)
    configure(docker, credsStore="knows", auths=INLINE)
    assert credentials.find(f"{HOST}/a/b") == RIGHT
    configure(docker, credHelpers={HOST: "knows", "other.example": 5}, credsStore="nothing", auths=INLINE)
    assert credentials.find(f"{HOST}/a/b") == RIGHT
    configure(docker, credHelpers={HOST: "nothing"}, credsStore="knows", auths=INLINE)
    found = credentials.find(f"{HOST}/a/b")
    assert found is not None
    assert found.name == "inline"
    configure(docker, credsStore="nothing")
    assert credentials.find(f"{HOST}/a/b") is None


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (None, "cannot be run"),
        ("echo pass: locked; exit 1", "fails"),
        ("exit 3", "fails"),
        ("echo '[]'", "gives no credentials"),
        ("head -c 99999 /dev/zero", "gives no credentials"),
    ],
)
def test_a_helper_that_fails_is_an_error_unless_it_is_written_down(
    docker: Path, make_helper: MakeHelper, script: str | None, words: str
) -> None:
    if script is not None:
        make_helper("broken", script)
    configure(docker, credsStore="broken", auths={HOST: {}})
    with pytest.raises(CredentialsError, match=words):
        credentials.find(HOST)
    configure(docker, credsStore="broken", auths=INLINE)
    found = credentials.find(HOST)
    assert found is not None
    assert found.name == "inline"


def test_a_helper_is_a_name_and_no_path(docker: Path, make_helper: MakeHelper) -> None:
    configure(docker, credsStore="../../bin/sh")
    with pytest.raises(CredentialsError, match="cannot be run"):
        credentials.find(HOST)


def test_a_helper_s_token_is_a_refresh_token(docker: Path, make_helper: MakeHelper) -> None:
    make_helper("acr", 'echo \'{"Username": "<token>", "Secret": "it"}\'')
    configure(docker, credHelpers={HOST: "acr"})
    assert credentials.find(HOST) == Credentials(name="<token>", password="it", identity=True)


# Logging in and out.


@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
def test_a_password_is_kept_once_the_registry_has_taken_it(
    docker: Path, auth: Auth, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    configure(docker, HttpHeaders={"a": "b"}, auths=INLINE)
    docker.chmod(0o644)

    def log_in(password: str) -> int:
        monkeypatch.setattr("sys.stdin.read", lambda: f"{password}\n", raising=False)
        return login_command.main([registry.host, "-u", USERNAME, "--password-stdin"])

    with Registry(auth=auth) as registry:
        with pytest.raises(CredentialsError):
            log_in("wrong")
        assert registry.host not in docker.read_text()
        assert log_in(PASSWORD) == 0
        assert credentials.find(f"{registry.host}/a/b") == RIGHT
        kept = json.loads(docker.read_text())
        assert (kept["HttpHeaders"], kept["auths"][HOST]) == ({"a": "b"}, INLINE[HOST])
        assert stat.S_IMODE(docker.stat().st_mode) == 0o600
        assert PASSWORD not in capsys.readouterr().out
        assert logout_command.main([registry.host]) == 0
        assert credentials.find(f"{registry.host}/a/b") is None
        assert "removed from" in capsys.readouterr().out
        assert logout_command.main([registry.host]) == 0
        assert "not logged in" in capsys.readouterr().out
    assert json.loads(docker.read_text()) == {"HttpHeaders": {"a": "b"}, "auths": INLINE}
    assert [path.name for path in docker.parent.iterdir()] == ["config.json"]


def test_a_helper_keeps_the_password_if_there_is_one(
    docker: Path, make_helper: MakeHelper, tmp_path: Path
) -> None:
    make_helper(
        "box",
        f"""case "$1" in
        store) cat >{tmp_path}/box;;
        get) cat {tmp_path}/box 2>/dev/null || {{ {KNOWS_NOTHING}; }};;
        erase) rm {tmp_path}/box;;
        esac""",
    )
    configure(docker, credsStore="box")
    assert login.store(HOST, RIGHT) == "docker-credential-box"
    assert json.loads(docker.read_text())["auths"] == {HOST: {}}
    assert credentials.find(HOST) == RIGHT
    assert login.erase(HOST) == ["docker-credential-box", str(docker)]
    assert credentials.find(HOST) is None


def test_where_a_password_is_kept(docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Credentials(name="of-team", password="x")
    login.store("docker.io", RIGHT)
    login.store(f"https://{HOST}/team/", other)
    assert set(json.loads(docker.read_text())["auths"]) == {HUB_KEY, f"{HOST}/team"}
    assert credentials.find("registry-1.docker.io/library/x") == RIGHT
    assert credentials.find(f"{HOST}/team/x") == other
    assert login.erase(HOST) == []
    assert login.erase(f"{HOST}/team") == [str(docker)]
    monkeypatch.delenv("DOCKER_CONFIG")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "new/auth.json"))
    assert login.store(HOST, RIGHT) == str(tmp_path / "new/auth.json")
    assert credentials.find(HOST) == RIGHT


def test_what_is_no_registry_is_not_asked(docker: Path) -> None:
    with pytest.raises(UsageError):
        login.check("horse", RIGHT, access_to())


def test_a_configuration_that_is_a_link_stays_one(docker: Path, tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    docker.symlink_to(tmp_path / "dotfiles/docker.json")
    login.store(HOST, RIGHT)
    assert docker.is_symlink()
    assert credentials.find(HOST) == RIGHT
