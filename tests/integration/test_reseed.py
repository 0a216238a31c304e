# SPDX-License-Identifier: Apache-2.0
"""Replicas of one image draw different random numbers, and a server can act before and after."""

import json
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS, Done, Rekindle, Replica, free_port, workhorse_flags

pytestmark = pytest.mark.criu

PACKAGE = """
before, after = [], []
def register_before_snapshot(func, *args, **kwargs):
    before.append((func, args, kwargs))
    return func
def register_after_restore(func, *args, **kwargs):
    after.append((func, args, kwargs))
    return func
def get_before_snapshot():
    return before
def get_after_restore():
    return after
"""
"""As snapshot_restore_py 1.0.0 keeps its callbacks."""


@pytest.fixture
def save(rekindle: Rekindle, port: int) -> Callable[..., Done]:
    """Makes a snapshot of dice, `image` unless named."""

    def snapshot(*behaviours: str, flags: tuple[str, ...] = ()) -> Done:
        command = [sys.executable, str(SERVERS / "dice.py"), str(port), *behaviours]
        return rekindle("snapshot", "dice", *workhorse_flags(port), *flags, "--", *command)

    return snapshot


Two = Callable[..., list[Replica]]


@pytest.fixture
def two(restore: Callable[..., Replica]) -> Two:
    """Restores two replicas, with the same flags."""
    return lambda *flags: [restore("dice", free_port(), "--require", "process", *flags) for _ in range(2)]


def draw(replica: Replica) -> dict[str, dict[str, Any]]:
    return dict(json.loads(replica.ask("/draw")))


def facts(replica: Replica) -> dict[str, Any]:
    return dict(json.loads(replica.ask("/facts")))


def has_hook(found: dict[str, Any]) -> bool:
    return any(name.startswith("rekindle ") for name in found["threads"])


def shared(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> set[tuple[str, str]]:
    """The kinds of numbers, by process, of which two replicas have drawn the same."""
    assert one.keys() == other.keys()
    return {(name, kind) for name in one for kind in one[name] if one[name][kind] == other[name][kind]}


@pytest.mark.parametrize("memory", ["map", "copy"])
def test_replicas_draw_different_numbers(save: Callable[..., Done], two: Two, memory: str) -> None:
    done = save("with=cryptography")
    assert done.status == 0, done.stderr
    assert "share the random numbers" not in done.stderr
    first, second = two("--memory", memory)
    one, other = draw(first), draw(second)
    assert one.keys() == {"itself", "spawn 0", "fork 1"}
    assert one["itself"].keys() >= {"random", "openssl", "uuid1", "tempfile", "cryptography"}
    assert not shared(one, other)
    names = [phase["name"] for phase in first.report["phases"]]
    assert names.index("restore") < names.index("reseed") < names.index("oracle")
    generations = {facts(replica)["generation"] for replica in (first, second)}
    assert len(generations) == 2
    assert all(len(each) == 32 for each in generations)
    for replica in (first, second):
        replica.ask("/fork", {})
    assert not shared(draw(first), draw(second)), "nor do processes that they start later"


def test_without_the_hook_replicas_draw_the_same(save: Callable[..., Done], two: Two) -> None:
    """What the tests of this module would look like if nothing was done."""
    done = save("with=cryptography", flags=("--reseed", "none"))
    assert done.status == 0, done.stderr
    first, second = two()
    kinds = {"random", "openssl", "tempfile", "cryptography"}
    assert {kind for _, kind in shared(draw(first), draw(second))} >= kinds
    assert "reseed" not in [phase["name"] for phase in first.report["phases"]]
    assert not has_hook(facts(first))
    assert facts(first)["generation"] != facts(second)["generation"], "other programs can read it"


def test_what_the_program_seeded_is_left_to_it(
    save: Callable[..., Done], two: Two, rekindle: Rekindle
) -> None:
    assert save("seeded").status == 0
    first, second = two()
    assert shared(draw(first), draw(second)) == {("itself", "random"), ("fork 1", "random")}
    first.kill()
    second.kill()
    assert save("seeded", flags=("--reseed", "all")).status == 0
    first, second = two()
    assert not shared(draw(first), draw(second))


@pytest.mark.parametrize("behaviour", ["callbacks", "callbacks-of-package"])
def test_callbacks_are_called_in_order(
    save: Callable[..., Done], two: Two, rekindle: Rekindle, tmp_path: Path, behaviour: str
) -> None:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "snapshot_restore_py.py").write_text(PACKAGE)
    rekindle.env["PYTHONPATH"] = str(tmp_path / "packages")
    done = save(behaviour)
    assert done.status == 0, done.stderr
    for replica in two():
        assert facts(replica)["called"] == ["before 2", "before 1", "after 1", "after 2"]


@pytest.mark.parametrize("phase", ["before", "after"])
def test_a_callback_that_fails_is_an_error(save: Callable[..., Done], rekindle: Rekindle, phase: str) -> None:
    done = save(f"fails={phase}")
    assert done.status == (30 if phase == "before" else 34), done.stderr
    assert "it raised an exception" in done.stderr
    assert "--reseed" in done.stderr
    assert rekindle("inspect", "dice").status != 0, "nothing is published"


def test_a_server_that_does_not_answer_is_not_restored(save: Callable[..., Done], rekindle: Rekindle) -> None:
    done = save("stuck", flags=("--no-prove",))
    assert done.status == 0, done.stderr
    done = rekindle("restore", "dice", "--require", "process")
    assert done.status == 34, done.stderr
    assert "did not answer within 10 s" in done.stderr


def test_a_process_that_is_busy_in_c_is_waited_for(save: Callable[..., Done], two: Two) -> None:
    done = save("busy")
    assert done.status == 0, done.stderr
    first, second = two()
    assert not shared(draw(first), draw(second))


def test_python_without_the_hook_is_told_of(save: Callable[..., Done], rekindle: Rekindle) -> None:
    done = save("isolated", flags=("--no-prove",))
    assert done.status == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "share the random numbers" in line]
    assert " -I " in line


def test_a_server_keeps_its_own_sitecustomize(
    save: Callable[..., Done], two: Two, rekindle: Rekindle, tmp_path: Path
) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text("import sys; sys.own_site = 'loaded'")
    rekindle.env["PYTHONPATH"] = str(tmp_path / "site")
    assert save().status == 0
    found = facts(two()[0])
    assert found["own_site"] == "loaded"
    assert has_hook(found)
    assert found["site_file"] == str(tmp_path / "site" / "sitecustomize.py")
    record = rekindle("inspect", "dice", "--json").json["record"]
    assert record["environment"].get("PYTHONPATH") in {None, str(tmp_path / "site")}
    assert len(record["process"]["hooked"]) == 4, "and that which cleans up for multiprocessing"


@pytest.mark.parametrize("behaviour", ["with=cryptography", "callbacks"])
def test_a_server_that_is_run_and_saved_is_reseeded(
    rekindle: Rekindle, two: Two, port: int, behaviour: str
) -> None:
    """Also the one that serves on."""
    command = [sys.executable, str(SERVERS / "dice.py"), str(port), behaviour]
    done = rekindle("run", "web", "--detach", *workhorse_flags(port), "--", *command)
    assert done.status == 0, done.stderr
    try:
        done = rekindle("snapshot", "dice", "--replica", "web")
        assert done.status == 0, done.stderr
        assert "WARNING" not in done.stderr
        record = rekindle("inspect", "dice", "--json").json["record"]
        assert len(record["process"]["hooked"]) >= 3
        first, second = two()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/draw", timeout=10) as response:
            own = json.loads(response.read())
        one, other = draw(first), draw(second)
        assert not shared(one, other)
        assert not shared(own, one)
        if behaviour == "callbacks":
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/facts", timeout=10) as response:
                called = json.loads(response.read())["called"]
            assert called == ["before 2", "before 1", "after 1", "after 2"]
            assert facts(first)["called"] == called
    finally:
        assert rekindle("stop", "web").status == 0


def test_a_server_that_is_run_without_the_hook_has_none(rekindle: Rekindle, two: Two, port: int) -> None:
    command = [sys.executable, str(SERVERS / "dice.py"), str(port)]
    flags = ["--detach", "--reseed", "none", *workhorse_flags(port)]
    assert rekindle("run", "web", *flags, "--", *command).status == 0
    try:
        assert rekindle("snapshot", "dice", "--replica", "web").status == 0
        first, second = two()
        assert {kind for _, kind in shared(draw(first), draw(second))} >= {"random", "openssl"}
        assert not has_hook(facts(first))
    finally:
        assert rekindle("stop", "web").status == 0


def test_a_callback_that_fails_leaves_a_server_that_is_run_as_it_was(rekindle: Rekindle, port: int) -> None:
    command = [sys.executable, str(SERVERS / "dice.py"), str(port), "fails=before"]
    assert rekindle("run", "web", "--detach", *workhorse_flags(port), "--", *command).status == 0
    try:
        done = rekindle("snapshot", "dice", "--replica", "web")
        assert done.status == 30, done.stderr
        assert "it raised an exception" in done.stderr
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/draw", timeout=10) as response:
            assert json.loads(response.read()).keys() == {"itself", "spawn 0", "fork 1"}
    finally:
        assert rekindle("stop", "web").status == 0
