# SPDX-License-Identifier: Apache-2.0
"""What the manifests of deploy/ run, with the privileges that they give."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hack.containers import ORACLE, PORT, SERVER, Container, ContainerTrial, trial
from tests.conftest import KeyPair, Rekindle
from tests.samples import cache
from tests.servers.registry.relay import Authority, Tls
from tests.servers.registry.simulator import Registry
from tests.unit.test_deploy import CHART, base, containers

pytestmark = [pytest.mark.criu, pytest.mark.timeout(300)]


class Kubernetes:
    """An API server that labels one node, for who has the token. Use it as a context."""

    def __init__(self, place: Path) -> None:
        self.labels: dict[str, str] = {}
        self.refuses = False
        place.mkdir()
        (place / "token").write_text("the token\n")
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status = 200
                if self.headers["Authorization"] != "Bearer the token" or cluster.refuses:
                    status = 403
                elif self.path != "/api/v1/nodes/node-7":
                    status = 404
                elif self.headers["Content-Type"] != "application/merge-patch+json":
                    status = 415
                else:
                    assert list(body) == ["metadata"]
                    assert list(body["metadata"]) == ["labels"]
                    cluster.labels |= body["metadata"]["labels"]
                self.send_response(status)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        authority = Authority(place)
        shutil.copy(authority.certificate, place / "ca.crt")
        self._front = Tls(authority.issue("127.0.0.1"), f"127.0.0.1:{self._server.server_port}")
        self.place = place

    def __enter__(self) -> "Kubernetes":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self._front.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        self._front.__exit__(None, None, None)
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        host, _, port = self._front.host.rpartition(":")
        names = {"KUBERNETES_SERVICE_HOST": host, "KUBERNETES_SERVICE_PORT": port}
        return {**names, "NODE_NAME": "node-7", "SERVICE_ACCOUNT": str(self.place)}


def pull_ahead(rekindle: Rekindle, cluster: Kubernetes, *image: str) -> int:
    script = CHART / "files" / "pull_ahead.py"
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, script, "--label", "rekindle/chat", "--", *image],
        env=rekindle.environment({**cluster.environment, "PATH": tools}),
        timeout=120,
        check=False,
    )
    return done.returncode


def test_a_node_pulls_what_it_can_restore_and_is_labelled(
    rekindle: Rekindle, horse_port: int, key_pair: KeyPair, tmp_path: Path
) -> None:
    assert shutil.which("rekindle", path=str(Path(sys.executable).parent))
    with Registry() as registry, Kubernetes(tmp_path / "account") as cluster:
        image = f"{registry.host}/snapshots/chat:1"
        assert rekindle("sign", "horse", *key_pair.sign).status == 0
        assert rekindle("push", "horse", image).status == 0
        node = Rekindle(tmp_path / "node", rekindle.env)

        cluster.refuses = True
        assert pull_ahead(node, cluster, image, *key_pair.verify) == 1
        assert cluster.labels == {}
        cluster.refuses = False
        assert pull_ahead(node, cluster, image, *key_pair.verify) == 0
        assert cluster.labels == {"rekindle/chat": "process"}
        kept = node("list", "--json").json["kept"]
        assert [each["kind"] for each in kept] == ["dump"]
        sent = registry.sent_bytes
        assert pull_ahead(node, cluster, image, *key_pair.verify) == 0
        assert registry.sent_bytes - sent < sent / 2, "the dump is here already"

        other = tmp_path / "other"
        words = ("generate-key-pair", "--output-key-prefix", str(other))
        assert rekindle(*words, env={"COSIGN_PASSWORD": ""}).status == 0
        cluster.labels.clear()
        assert pull_ahead(node, cluster, image, "--verify-key", f"{other}.pub") == 1
        assert cluster.labels == {}, "who signed it is not trusted"

    assert pull_ahead(node, cluster, image, *key_pair.verify) == 1, "there is no registry any more"
    assert cluster.labels == {}


def podman(security: dict[str, Any], name: str = "") -> Container:
    """Return the container of podman that has what a securityContext gives."""
    user = security["runAsUser"]
    flags = [f"--user={user}", "--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:notmpcopyup"]
    flags += [f"--cap-drop={each}" for each in security["capabilities"]["drop"]]
    flags += [f"--cap-add={each}" for each in security["capabilities"].get("add", [])]
    if security["seccompProfile"]["type"] == "Unconfined":
        flags.append("--security-opt=seccomp=unconfined")
    if security.get("allowPrivilegeEscalation") is False:
        flags.append("--security-opt=no-new-privileges")
    # The checkout is root's, and the containers' file system is this machine's.
    flags += ["--cap-add=DAC_READ_SEARCH"] if user else []
    return Container(name=name, flags=flags, user=user)


def container(where: str) -> Container:
    return podman(containers(base())[where]["securityContext"])


@pytest.fixture(scope="module")
def tried() -> Iterator[ContainerTrial]:
    """What the Job has saved in its container, and proved there."""
    if not shutil.which("podman"):
        pytest.skip("this test needs podman and crun")
    with trial() as made:
        place = made.podman.place
        words = ["snapshot", f"oci:{place}/images:chat", "--sign-key", f"{place}/key.key"]
        words += ["--oracle-request", str(ORACLE), "--ready-url", f"http://127.0.0.1:{PORT}/health"]
        name = made.start(container("Job/chat-snapshot/snapshot"), *words, "--", *SERVER, str(PORT))
        assert made.podman.status(name) == 0, made.podman.log(name)
        assert "prove " in made.podman.log(name)
        yield made


def test_the_server_of_the_deployment_is_restored(tried: ContainerTrial) -> None:
    name, report = tried.restore(container("Deployment/chat/server"), "chat")
    assert report["outcome"] == "restored", report["reasons"]
    assert report["pid"] == 1
    assert tried.stop(name) == 0


@pytest.mark.parametrize("missing", ["SYS_ADMIN", "NET_ADMIN", "SYS_TIME", "SYS_CHROOT", "SETPCAP"])
def test_with_one_capability_less_it_is_not(tried: ContainerTrial, missing: str) -> None:
    security = containers(base())["Deployment/chat/server"]["securityContext"]
    fewer = [each for each in security["capabilities"]["add"] if each != missing]
    less = {**security, "capabilities": {"drop": ["ALL"], "add": fewer}}
    name, report = tried.restore(podman(less), "chat")
    assert report["outcome"] == "cold"
    assert tried.stop(name) == 3


def test_the_job_needs_to_be_without_a_filter(tried: ContainerTrial) -> None:
    security = containers(base())["Job/chat-snapshot/snapshot"]["securityContext"]
    filtered = podman({**security, "seccompProfile": {"type": "RuntimeDefault"}})
    assert tried.snapshot(filtered, "filtered") == 10


def test_the_node_matches_as_the_server_does(tried: ContainerTrial) -> None:
    place = tried.podman.place
    words = ["match", f"oci:{place}/images:chat", "--verify-key", f"{place}/key.pub"]
    name = tried.start(container("DaemonSet/chat-node/pull-ahead"), *words)
    assert tried.podman.status(name) == 0, tried.podman.log(name)


def test_metrics_are_served_without_a_privilege(tried: ContainerTrial) -> None:
    name = tried.start(container("DaemonSet/chat-node/metrics"), "metrics")
    assert tried.podman.status(name) == 0, tried.podman.log(name)
    assert "rekindle_replicas{" in tried.podman.log(name)


def shell(made: ContainerTrial, where: str, script: Sequence[str], *words: str, **variables: str) -> str:
    """Run a command of a container as the manifest has it, with other words; return the container's name."""
    place = made.podman.place / "cache"
    place.mkdir(exist_ok=True)
    os.chown(place, 1000, 1000)
    home = made.podman.place / "home-of-init"
    home.mkdir(exist_ok=True)
    os.chown(home, 1000, 1000)
    given = containers(base())[where]
    told = podman(given["securityContext"])
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"REKINDLE_HOME": str(home), "PATH": tools, **variables}
    flags = [*told.flags, f"--volume={place}:/cache"]
    return made.podman.start(flags, [*script, *words], environment)


def test_the_init_container_extracts_without_a_privilege(tried: ContainerTrial) -> None:
    place = tried.podman.place
    kernels = place / "kernels"
    cache.triton(kernels)
    flags = ["--dir", str(kernels), "--kind", "triton", "--sign-key", f"{place}/key.key"]
    name = tried.start(
        container("Job/chat-snapshot/snapshot"), "pack-cache", f"oci:{place}/images:cache", *flags
    )
    assert tried.podman.status(name) == 0, tried.podman.log(name)

    init = containers(base())["Deployment/chat-fallback/extract"]["command"]
    words = [f"oci:{place}/images:cache", "--verify-key", f"{place}/key.pub"]
    name = shell(tried, "Deployment/chat-fallback/extract", init, *words)
    assert tried.podman.status(name) == 0, tried.podman.log(name)
    environment = (place / "cache" / "environment").read_text()
    assert re.search(r"export TRITON_CACHE_DIR=/cache/triton", environment), tried.podman.log(name)

    server = containers(base())["Deployment/chat-fallback/server"]["command"]
    program = ["sh", "-c", "id -u; find $TRITON_CACHE_DIR -type f | wc -l"]
    name = shell(tried, "Deployment/chat-fallback/server", server, *program)
    assert tried.podman.status(name) == 0
    files = sum(path.is_file() for path in kernels.rglob("*"))
    assert tried.podman.log(name).split() == ["1000", str(files)]


def test_an_image_that_is_refused_leaves_the_server_without_a_cache(tried: ContainerTrial) -> None:
    place = tried.podman.place
    init = containers(base())["Deployment/chat-fallback/extract"]["command"]
    (place / "cache").mkdir(exist_ok=True)
    name = shell(tried, "Deployment/chat-fallback/extract", init, f"oci:{place}/images:chat")
    assert tried.podman.status(name) == 0
    assert (place / "cache" / "environment").read_text() == ""
