# SPDX-License-Identifier: Apache-2.0
"""Snapshots that go to a registry at once, and pulls of one image side by side."""

from collections.abc import Callable
from pathlib import Path

import pytest

from oci.layout import Layout
from tests.conftest import Rekindle, Replica
from tests.samples.image import make_image
from tests.servers.registry import misbehaviour as wrong
from tests.servers.registry.simulator import Registry


@pytest.mark.criu
def test_a_registry_that_cannot_be_reached_is_said_before_the_server_starts(
    rekindle: Rekindle, port: int
) -> None:
    done = rekindle.snapshot_workhorse("127.0.0.1:1/a/b:1", port)
    assert done.status == 40, done.stderr
    assert "ready" not in done.stderr
    done = rekindle.snapshot_workhorse(f"127.0.0.1:1/a/b@sha256:{'0' * 64}", port)
    assert done.status == 2, done.stderr


@pytest.mark.criu
def test_a_snapshot_that_cannot_be_pushed_is_kept(
    rekindle: Rekindle, restore: Callable[..., Replica], port: int
) -> None:
    with Registry(misbehave=[wrong.status(403, on=wrong.upload(method="POST"))]) as registry:
        done = rekindle.snapshot_workhorse(f"{registry.host}/team/horse:2", port)
    assert done.status == 41, done.stderr
    assert "rekindle push team/horse:2" in done.stderr
    assert restore("team/horse:2", port).report["trust"]["verified"]


def test_an_image_is_pulled_twice_at_once(rekindle: Rekindle, tmp_path: Path) -> None:
    digest = make_image(tmp_path / "from", layers=4)
    with Registry() as registry:
        image = f"{registry.host}/a/b:1"
        assert rekindle("push", f"oci:{tmp_path}/from:1", image).status == 0
        logs = [tmp_path / f"log-{number}" for number in range(3)]
        pulls = [
            rekindle.spawn("pull", image, f"mine-{number}", "--limit-rate", "8M", log=log)
            for number, log in enumerate(logs)
        ]
        statuses = [pull.wait(60) for pull in pulls]
        assert statuses == [0, 0, 0], [log.read_text() for log in logs]
    tags = Layout(rekindle.home / "store").tags()
    assert {tags[f"mine-{number}:latest"].digest for number in range(3)} == {digest}
    assert not (rekindle.home / "store" / ".incoming").exists()
