# SPDX-License-Identifier: Apache-2.0
"""Images by way of registries: the real docker-registry, the clients of others, and interruptions."""

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from oci.layout import Layout
from rekindle.digest import Digest
from tests.conftest import (
    CRANE,
    GO_REGISTRY,
    NGINX,
    ORAS,
    SKOPEO,
    KeyPair,
    Rekindle,
    Replica,
    need,
    wait_for,
)
from tests.samples.image import LAYER_BYTES, LAYERS, make_image
from tests.servers.registry.access import PASSWORD, USERNAME, Auth
from tests.servers.registry.docker_registry import DockerRegistry
from tests.servers.registry.front_end import FrontEnd
from tests.servers.registry.go_registry import GoRegistry
from tests.servers.registry.simulator import Registry

Start = Callable[..., DockerRegistry]


def run(*argv: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([*map(str, argv)], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{argv}: {done.stderr}"
    return done.stdout


def digest_of(done_json: Any) -> str:
    return str(done_json["image"]["digest"])


@pytest.fixture(params=["docker-registry", "crane's", "one with the referrers API"])
def start_registry(
    request: pytest.FixtureRequest, start_docker_registry: Start
) -> Iterator[Callable[[Path], DockerRegistry | GoRegistry]]:
    """Starts a real registry of each make that there is."""
    commands: dict[str, list[str | Path]] = {
        "crane's": [CRANE, "registry", "serve", "--address"],
        "one with the referrers API": [GO_REGISTRY],
    }
    with contextlib.ExitStack() as running:

        def start(place: Path) -> DockerRegistry | GoRegistry:
            if request.param not in commands:
                return start_docker_registry()
            command = commands[request.param]
            need(Path(command[0]).exists(), "a registry in Go", "hack/get-go-registry makes it")
            return running.enter_context(GoRegistry(command, place))

        yield start


@pytest.mark.registry
def test_an_image_goes_round_with_its_digest(
    rekindle: Rekindle, start_registry: Callable[[Path], Any], tmp_path: Path
) -> None:
    host = start_registry(tmp_path / "registry").host
    digest = make_image(tmp_path / "from")
    there, other = f"{host}/team/image:1", f"{host}/team/other:2"
    pushed = rekindle("push", f"oci:{tmp_path}/from:1", there, "--json").json
    assert (pushed["outcome"], digest_of(pushed)) == ("saved", digest)
    assert pushed["bytes"] == {"fetched": 0, "sent": LAYERS * LAYER_BYTES + 2, "reused": 0}

    again = rekindle("push", f"oci:{tmp_path}/from:1", there, "--json").json
    assert again["bytes"] == {"fetched": 0, "sent": 0, "reused": LAYERS * LAYER_BYTES + 2}

    copied = rekindle("copy", there, other, "--json").json
    assert copied["bytes"] == {"fetched": 0, "sent": 0, "reused": LAYERS * LAYER_BYTES + 2}, "mounted"

    pulled = rekindle("pull", f"{other}@{digest}", "mine:3", "--json").json
    assert digest_of(pulled) == digest
    assert pulled["bytes"]["fetched"] == LAYERS * LAYER_BYTES + 2
    store = Layout(rekindle.home / "store")
    assert store.resolve("mine:3").digest == digest
    assert not (rekindle.home / "store" / ".incoming").exists()

    back = rekindle("copy", "mine:3", f"oci:{tmp_path}/to:1", "--json").json
    assert digest_of(back) == digest
    assert {p.name for p in (tmp_path / "to/blobs/sha256").iterdir()} == {
        p.name for p in (tmp_path / "from/blobs/sha256").iterdir()
    }


@pytest.mark.registry
def test_others_read_list_and_copy_what_was_pushed(
    rekindle: Rekindle, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    digest = make_image(tmp_path / "from", layers=2)
    host = docker_registry.host
    image = f"{host}/team/image"
    assert rekindle("push", f"oci:{tmp_path}/from:1", f"{image}:1").status == 0

    manifest = json.loads(run(ORAS, "manifest", "fetch", "--plain-http", f"{image}:1"))
    assert len(manifest["layers"]) == 2
    assert run(ORAS, "resolve", "--plain-http", f"{image}:1").strip() == digest
    assert run(ORAS, "repo", "tags", "--plain-http", image).split() == ["1"]
    run(ORAS, "cp", "--from-plain-http", "--to-plain-http", f"{image}:1", f"{host}/team/oras:1")

    skopeo = (SKOPEO, "--insecure-policy")
    raw = run(*skopeo, "inspect", "--raw", "--tls-verify=false", f"docker://{image}:1")
    assert Digest.of_bytes(raw.encode()) == digest
    assert json.loads(run(*skopeo, "list-tags", "--tls-verify=false", f"docker://{image}"))["Tags"] == ["1"]
    run(
        *skopeo,
        *("copy", "--all", "--preserve-digests", "--src-tls-verify=false", "--dest-tls-verify=false"),
        *(f"docker://{image}:1", f"docker://{host}/team/skopeo:1"),
    )

    assert run(CRANE, "digest", "--insecure", f"{image}:1").strip() == digest
    assert run(CRANE, "ls", "--insecure", image).split() == ["1"]
    run(CRANE, "copy", "--insecure", f"{image}:1", f"{host}/team/crane:1")

    for name in ("oras", "skopeo", "crane"):
        done = rekindle("pull", f"{host}/team/{name}:1", name, "--json")
        assert digest_of(done.json) == digest, name


@pytest.mark.registry
def test_what_others_pushed_is_pulled(
    rekindle: Rekindle, docker_registry: DockerRegistry, tmp_path: Path
) -> None:
    digest = make_image(tmp_path / "from", layers=2)
    image = f"{docker_registry.host}/team/image:1"
    run(ORAS, "cp", "--from-oci-layout", f"{tmp_path}/from:1", "--to-plain-http", image)
    assert digest_of(rekindle("pull", image, "--json").json) == digest


@pytest.mark.registry
def test_a_front_end_that_limits_requests_gets_an_upload_in_chunks(
    rekindle: Rekindle, start_registry: Callable[[Path], Any], tmp_path: Path
) -> None:
    digest = make_image(tmp_path / "from", layers=3, size=(3 << 20) + 1)
    with FrontEnd(NGINX, tmp_path / "nginx", start_registry(tmp_path / "registry").host) as front_end:
        there = f"{front_end.host}/team/image:1"
        done = rekindle("push", f"oci:{tmp_path}/from:1", there)
        assert (done.status, "takes no upload of this size" in done.stderr) == (40, True), done.stderr
        assert "chunk_bytes" in done.stderr
        settings = f'[registry."{front_end.host}"]\nchunk_bytes = 1000000\n'
        (rekindle.home / "config.toml").write_text(settings)
        done = rekindle("push", f"oci:{tmp_path}/from:1", there, "--json")
        assert done.status == 0, done.stderr
        sent = done.json["bytes"]
        # The first attempt may have brought the config already.
        assert sent["sent"] + sent["reused"] == 3 * ((3 << 20) + 1) + 2
        assert sent["reused"] <= 2
        assert run(CRANE, "digest", "--insecure", there).strip() == digest
        assert rekindle("pull", there, "mine").status == 0


@pytest.mark.registry
def test_a_registry_with_a_certificate_of_one_s_own(
    rekindle: Rekindle, start_docker_registry: Start, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "tls.pem", tmp_path / "tls.key"
    run(
        *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=registry"),
        *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
    )
    registry = start_docker_registry(tls=(certificate, key))
    digest = make_image(tmp_path / "from", layers=3)
    image = f"{registry.host}/team/image:1"
    words = ["push", f"oci:{tmp_path}/from:1", image]

    rekindle.home.mkdir(exist_ok=True)
    configuration = rekindle.home / "config.toml"
    plain = rekindle(*words)
    assert plain.status == 40, plain.stderr
    assert "HTTP request to an HTTPS server" in plain.stderr
    configuration.write_text(f'[registry."{registry.host}"]\nplain_http = false\n')
    unknown = rekindle(*words)
    assert unknown.status == 40, unknown.stderr
    assert "certificate verify failed" in unknown.stderr
    assert "ca_file" in unknown.stderr
    configuration.write_text(f'[registry."{registry.host}"]\nplain_http = false\nca_file = "{certificate}"\n')
    assert rekindle(*words).status == 0
    assert digest_of(rekindle("pull", image, "--json").json) == digest


@pytest.mark.registry
@pytest.mark.parametrize("auth", [Auth.BASIC, Auth.TOKEN])
def test_docker_s_credentials_are_used(
    rekindle: Rekindle, start_docker_registry: Start, tmp_path: Path, auth: Auth
) -> None:
    registry = start_docker_registry(auth)
    digest = make_image(tmp_path / "from", layers=2)
    image = f"{registry.host}/team/image:1"
    configuration = {"DOCKER_CONFIG": str(tmp_path / "docker")}
    (tmp_path / "docker").mkdir()
    without = rekindle("push", f"oci:{tmp_path}/from:1", image, env=configuration)
    assert without.status == 41, without.stderr
    assert "docker login" in without.stderr

    write_credentials(tmp_path / "docker", registry.host, USERNAME, "wrong")
    wrong = rekindle("push", f"oci:{tmp_path}/from:1", image, env=configuration)
    assert wrong.status == 41, wrong.stderr
    assert "wrong" not in wrong.stderr

    write_credentials(tmp_path / "docker", registry.host, USERNAME, PASSWORD)
    assert rekindle("push", f"oci:{tmp_path}/from:1", image, env=configuration).status == 0
    assert digest_of(rekindle("pull", image, "--json", env=configuration).json) == digest


@pytest.mark.registry
def test_a_credential_helper_is_asked(
    rekindle: Rekindle, start_docker_registry: Start, tmp_path: Path
) -> None:
    registry = start_docker_registry(Auth.TOKEN)
    make_image(tmp_path / "from", layers=1)
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker/config.json").write_text(json.dumps({"credHelpers": {registry.host: "test"}}))
    helper = tmp_path / "bin/docker-credential-test"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": registry.host, "Username": USERNAME, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{answer}'\n")
    helper.chmod(0o755)
    env = {"DOCKER_CONFIG": str(tmp_path / "docker"), "PATH": f"{helper.parent}:{os.environ['PATH']}"}
    done = rekindle("push", f"oci:{tmp_path}/from:1", f"{registry.host}/a/b:1", env=env)
    assert done.status == 0, done.stderr


def write_credentials(directory: Path, host: str, name: str, password: str) -> None:
    import base64

    auth = base64.b64encode(f"{name}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def kill_after(rekindle: Rekindle, words: Sequence[str], seconds: float, log: Path) -> int:
    process = rekindle.spawn(*words, log=log)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait(30)


def test_a_push_that_is_killed_sends_no_finished_blob_again(rekindle: Rekindle, tmp_path: Path) -> None:
    digest = make_image(tmp_path / "from")
    chance = random.Random(1)
    with Registry() as registry:
        words = [
            "push",
            f"oci:{tmp_path}/from:1",
            f"{registry.host}/a/b:1",
            "--limit-rate",
            "8M",
            "--jobs",
            "4",
        ]
        for _ in range(10):
            assert kill_after(rekindle, words, chance.uniform(0.2, 0.9), tmp_path / "log") in {0, -9}
        assert rekindle(*words).status == 0, (tmp_path / "log").read_text()
        finished = Counter(r.reference for r in registry.uploads() if r.method == "PUT" and r.status == 201)
        assert max(finished.values()) == 1
        assert len(finished) == LAYERS + 1
        assert str(digest) in registry.repositories["a/b"].manifests


def test_a_pull_that_is_killed_fetches_no_finished_blob_again(rekindle: Rekindle, tmp_path: Path) -> None:
    digest = make_image(tmp_path / "from")
    chance = random.Random(2)
    with Registry() as registry:
        assert rekindle("push", f"oci:{tmp_path}/from:1", f"{registry.host}/a/b:1").status == 0
        words = ["pull", f"{registry.host}/a/b:1", "mine", "--limit-rate", "8M", "--jobs", "4"]
        store = rekindle.home / "store"
        finished: set[str] = set()
        for _ in range(10):
            registry.requests.clear()
            assert kill_after(rekindle, words, chance.uniform(0.2, 0.9), tmp_path / "log") in {0, -9}
            asked = {r.reference for r in registry.downloads()}
            assert not asked & finished
            blobs = (store / ".incoming" / digest.hex / "blobs/sha256").glob("[!.]*")
            finished = {f"sha256:{path.name}" for path in blobs} or finished
            assert not (store / "blobs/sha256" / digest.hex).exists() or not (store / ".incoming").exists()
        assert len(finished) > 1
        done = rekindle(*words, "--json")
        assert digest_of(done.json) == digest
        assert not (store / ".incoming").exists()
        assert not list((store / "blobs/sha256").glob(".*"))
        assert Layout(store).resolve("mine:latest").digest == digest


def test_an_interrupt_ends_a_stalled_pull_at_once(rekindle: Rekindle, tmp_path: Path) -> None:
    from tests.servers.registry import misbehaviour as wrong

    make_image(tmp_path / "from")
    with Registry() as registry:
        assert rekindle("push", f"oci:{tmp_path}/from:1", f"{registry.host}/a/b:1").status == 0
        registry.misbehave(wrong.stalls(wrong.blob(), after_bytes=1000))
        process = rekindle.spawn("pull", f"{registry.host}/a/b:1", "mine", log=tmp_path / "log")
        wait_for(lambda: len(registry.downloads()) > 3, 10)
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert process.wait(20) == 128 + signal.SIGINT
        assert time.monotonic() - began < 5


def test_what_cannot_be_reached_is_said_at_once(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    began = time.monotonic()
    done = rekindle("pull", f"127.0.0.1:{port}/a/b:1", "mine")
    assert done.status == 40
    assert "cannot be reached" in done.stderr
    assert time.monotonic() - began < 5
    missing = rekindle("push", "nothing", f"127.0.0.1:{port}/a/b:1")
    assert missing.status == 12


def test_an_image_that_is_not_there(rekindle: Rekindle) -> None:
    with Registry() as registry:
        done = rekindle("pull", f"{registry.host}/a/b:1")
        assert done.status == 12, done.stderr
        assert "MANIFEST_UNKNOWN" in done.stderr or "NAME_UNKNOWN" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("push", "horse", "horse2"),
        ("push", "127.0.0.1:1/a", "127.0.0.1:1/b"),
        ("pull", "horse"),
        ("pull", "127.0.0.1:1/a", "127.0.0.1:1/b"),
        ("pull", "127.0.0.1:1/a", "x", "--unpack"),
        ("pull", "127.0.0.1:1/a", "--jobs", "0"),
        ("pull", "127.0.0.1:1/a", "--limit-rate", "fast"),
        ("pull", "127.0.0.1:1/a", "--mirror", "ftp://x"),
        ("copy", "horse", "Horse"),
    ],
)
def test_what_makes_no_sense_is_refused(rekindle: Rekindle, words: tuple[str, ...]) -> None:
    assert rekindle(*words).status == 2


def test_a_configuration_that_is_wrong(rekindle: Rekindle) -> None:
    rekindle.home.mkdir(exist_ok=True)
    (rekindle.home / "config.toml").write_text("[limit]\n")
    done = rekindle("pull", "127.0.0.1:1/a")
    assert done.status == 2
    assert "'limit'" in done.stderr


def test_an_image_with_another_digest_is_not_pushed_as_that(rekindle: Rekindle, tmp_path: Path) -> None:
    make_image(tmp_path / "from", layers=1, size=10)
    with Registry() as registry:
        done = rekindle("push", f"oci:{tmp_path}/from:1", f"{registry.host}/a/b@sha256:{'0' * 64}")
        assert done.status == 2, done.stderr
        assert not registry.uploads()


def test_a_damaged_layer_is_not_pushed(rekindle: Rekindle, tmp_path: Path) -> None:
    make_image(tmp_path / "from", layers=2)
    blob = max((tmp_path / "from/blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(blob.read_bytes())
    content[500] ^= 1
    blob.write_bytes(content)
    with Registry() as registry:
        done = rekindle("push", f"oci:{tmp_path}/from:1", f"{registry.host}/a/b:1")
        assert done.status == 21, done.stderr
        assert blob.name in done.stderr
        assert not registry.repositories["a/b"].tags


@pytest.mark.criu
@pytest.mark.registry
def test_a_server_is_restored_from_a_registry(
    rekindle: Rekindle,
    docker_registry: DockerRegistry,
    restore: Callable[..., Replica],
    key_pair: KeyPair,
    port: int,
    tmp_path: Path,
    nothing_left: Callable[[], None],
) -> None:
    image = f"{docker_registry.host}/horses/horse:1"
    done = rekindle.snapshot_workhorse(image, port, flags=key_pair.sign)
    assert done.status == 0, done.stderr
    assert not list((rekindle.home / "store").rglob("index.json"))
    assert "fits here" in rekindle("inspect", image).stdout

    elsewhere = Rekindle(tmp_path / "elsewhere", rekindle.env)
    replica = restore(image, port, *key_pair.verify, of=elsewhere)
    assert replica.report["outcome"] == "restored"
    assert replica.report["bytes"]["fetched"] > 1_000_000
    assert replica.ask("/health")
    replica.kill()
    again = restore(image, port, *key_pair.verify, of=elsewhere)
    assert again.report["bytes"]["fetched"] < 1_000_000, "only what the decision needs"
    again.kill()

    ready = Rekindle(tmp_path / "ready", rekindle.env)
    unpacked = ready("pull", "--unpack", image, *key_pair.verify, "--json").json
    assert unpacked["bytes"]["fetched"] > 1_000_000
    third = restore(image, port, *key_pair.verify, of=ready)
    assert third.report["bytes"]["fetched"] < 1_000_000
    third.kill()
    nothing_left()


@pytest.mark.criu
def test_a_layer_with_other_bytes_is_never_restored(
    rekindle: Rekindle, port: int, key_pair: KeyPair, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    from tests.servers.registry import misbehaviour as wrong

    with Registry() as registry:
        image = f"{registry.host}/a/b:1"
        assert rekindle.snapshot_workhorse(image, port, flags=key_pair.sign).status == 0
        elsewhere = Rekindle(tmp_path / "elsewhere", rekindle.env)
        layers = elsewhere("inspect", image, "--json").json["process_image"]["layers"]
        pages = next(x["digest"] for x in layers if x["annotations"]["vnd.rekindle.role"] == "pages")
        registry.misbehave(wrong.wrong_bytes(pages))
        done = elsewhere("restore", image, *key_pair.verify)
        assert done.status in {20, 21}, done.stderr
        assert not list((elsewhere.home / "dumps").glob("*/ready.json"))
        assert not list((elsewhere.home / "run").iterdir())

        # A mirror that lies costs time and nothing else.
        registry.behave()
        with Registry(misbehave=[wrong.wrong_bytes(pages)]) as mirror:
            mirror.repositories = registry.repositories
            words = ["pull", "--unpack", image, *key_pair.verify, "--mirror", f"http://{mirror.host}"]
            done = elsewhere(*words, "--json")
            assert done.status == 0, done.stderr
            assert mirror.downloads(pages)
    nothing_left()
