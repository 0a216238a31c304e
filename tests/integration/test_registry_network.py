# SPDX-License-Identifier: Apache-2.0
"""Registries on a machine of their own: its /etc, its name service, its proxies, as commands meet them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Rekindle
from tests.servers.registry.isolated import FAILURES
from tests.servers.registry.relay import Proxy
from tests.servers.registry.simulator import Registry

CLEAN = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has namespaces of its own")
def test_certs_d_of_docker_and_a_name_service_that_comes_up_late(tmp_path: Path) -> None:
    done = subprocess.run(
        ["unshare", "--mount", "--net", sys.executable, "-m", "tests.servers.registry.isolated", tmp_path],
        cwd=ROOT,
        env=CLEAN,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["status"] == 0, seen
    assert seen["shown"] == ["node-7"]
    assert seen["queries"] > FAILURES
    assert list((tmp_path / "out" / "blobs" / "sha256").iterdir())


def test_a_command_takes_the_proxy_of_its_environment(rekindle: Rekindle, tmp_path: Path) -> None:
    with Registry() as registry, Proxy({"registry.test:80": registry.host}, login="me:secret") as proxy:
        registry.add_image("a/b", "1", b"layer")
        words = ["copy", "registry.test/a/b:1", f"oci:{tmp_path}/out:1", "--plain-http"]
        done = rekindle(*words, env={"http_proxy": f"http://me:secret@{proxy.host}"})
        assert done.status == 0, done.stderr
        assert {line.split()[1].partition("/v2/")[0] for line in proxy.asked} == {"http://registry.test"}
        done = rekindle(*words, env={"http_proxy": f"http://me:wrong@{proxy.host}"})
        assert done.status == 40
        assert "the proxy for registry.test asks for a password" in done.stderr
        assert "wrong" not in done.stderr
