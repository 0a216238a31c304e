# SPDX-License-Identifier: Apache-2.0
"""A server in real containers, by podman and crun: it ends there as it would without us.

`hack/containers` tries more kinds of them, which takes longer, and writes the table of docs/operations.md.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from hack.containers import (
    BEGIN,
    CONTAINERS,
    END,
    PAGE,
    PORT,
    PRIVILEGED,
    UNFILTERED,
    Container,
    ContainerTrial,
    trial,
)
from restore.flow import LOWER_STATUS
from tests.integration.scenes import MULE

pytestmark = [
    pytest.mark.criu,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not shutil.which("podman"), reason="this test needs podman and crun"),
]
FILTERED = next(each for each in CONTAINERS if each.name == "... and `--read-only`")
USER = next(each for each in CONTAINERS if each.user)
LIMITED = Container(name="", flags=["--privileged", "--memory=200m", "--memory-swap=200m"])


@pytest.fixture(scope="module")
def tried() -> Iterator[ContainerTrial]:
    with trial() as made:
        assert made.snapshot(PRIVILEGED, "mule", [*MULE, "drains=1"]) == 0
        yield made


@pytest.mark.parametrize("rung", ["process", "cold"])
def test_podman_stop_lets_the_server_drain(tried: ContainerTrial, rung: str) -> None:
    name, report = tried.restore(PRIVILEGED, "mule", "--rung", rung)
    assert report["pid"] == 1
    assert report["outcome"] == {"process": "restored"}.get(rung, rung)
    assert tried.stop(name) == 0
    assert tried.podman.log(name).count("mule: signal 15") == 1


def test_a_limit_of_memory_kills_the_server_and_not_us(tried: ContainerTrial) -> None:
    """We are there to tell it: by the status that the server has as PID 1 of such a container."""
    name, _ = tried.restore(LIMITED, "mule")
    ask(tried, name, "/eat")
    assert tried.podman.status(name) == 137


def test_a_read_only_container_with_the_default_filter_restores_the_process(tried: ContainerTrial) -> None:
    assert tried.snapshot(UNFILTERED, "few") == 0
    name, report = tried.restore(FILTERED, "few")
    assert report["outcome"] == "restored", report["reasons"]
    assert tried.stop(name) == 0


def test_another_user_than_root_is_served_cold(tried: ContainerTrial) -> None:
    name, report = tried.restore(USER, "mule")
    assert report["outcome"] == "cold", report["reasons"]
    assert tried.stop(name) == LOWER_STATUS


def ask(tried: ContainerTrial, name: str, path: str) -> None:
    """Sends a request to a server from within the network of its container."""
    program = "import sys, urllib.request as u; u.urlopen(sys.argv[1], b'{}', 30)"
    inside = ["nsenter", "--target", str(tried.podman.state(name)["Pid"]), "--net"]
    url = f"http://127.0.0.1:{PORT}{path}"
    subprocess.run([*inside, sys.executable, "-c", program, url], stderr=subprocess.DEVNULL, check=False)


def test_the_table_has_all_containers() -> None:
    written = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].splitlines()[2:]
    assert [line.split("|")[1].strip() for line in written] == [each.name for each in CONTAINERS]
