# SPDX-License-Identifier: Apache-2.0
"""The same command in what containers make of a machine: what is restored there, and what takes its place.

docs/operations.md has a table of it.
"""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import SERVERS
from tests.integration.scenes import MULE, Running, Saved, Scene, save, scene

pytestmark = pytest.mark.criu
LOWER = 3

# What a container by Docker or containerd has, if nobody says otherwise.
DEFAULT = (
    *("chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap"),
    *("net_bind_service", "net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"),
)
# What a restore needs, and no other.
NEEDED = ("sys_admin", "net_admin", "sys_time", "sys_chroot", "setpcap")

PID_1 = [
    *("unshare", "--mount", "--propagation", "private", "--cgroup"),
    *("--pid", "--fork", "--mount-proc", "--kill-child"),
]

# As runtimes hide and lock them: opencontainers/runtime-spec's maskedPaths and readonlyPaths by Docker.
MASKED = """
for file in /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/sched_debug; do
    test ! -e $file || mount --bind /dev/null $file
done
for directory in /proc/acpi /proc/scsi /sys/firmware; do
    test ! -d $directory || mount -t tmpfs -o ro tmpfs $directory
done
for path in /proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger; do
    test ! -e $path || { mount --bind $path $path; mount -o remount,bind,ro $path; }
done
"""


def has(*capabilities: str) -> list[str]:
    """With these capabilities, and no other."""
    words = ",".join(["-all", *(f"+{name}" for name in capabilities)])
    return ["setpriv", "--bounding-set", words, "--inh-caps", "-all"]


def lacks(*capabilities: str) -> list[str]:
    words = ",".join(f"-{name}" for name in capabilities)
    return ["setpriv", "--bounding-set", words, "--inh-caps", words]


def filtered(*names: str) -> list[str]:
    """With a filter that forbids these system calls."""
    return [sys.executable, str(SERVERS / "filtered.py"), ",".join(names)]


def mounted(script: str) -> list[str]:
    """As PID 1, after a script has changed the mounts."""
    return [*PID_1, "sh", "-euc", f'{script}\nexec "$@"', "sh"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def saved_with_few(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A snapshot of a server that had no more capabilities than a restore needs."""
    return save(tmp_path_factory.mktemp("saved-with-few"), prefix=has(*NEEDED))


@contextlib.contextmanager
def container(saved: Saved, directory: Path, prefix: Sequence[str]) -> Iterator[Scene]:
    with scene(saved, directory) as made:
        for known in (made.rekindle.home / "tools").iterdir():
            known.unlink()  # here, all is tried anew
        made.rekindle.prefix = list(prefix)
        yield made


def is_restored(scene: Scene) -> None:
    running = scene.restore()
    running.until_ready("restored")
    assert running.reasons == []
    assert running.ask("/count", {}) == "1"
    end(running, 15)


def end(running: Running, signum: int) -> None:
    """Our child may be a program in front of rekindle that passes nothing on."""
    os.kill(running.report["pid"] if running.report["pid"] > 1 else inner(running), signum)
    running.process.wait(30)


def inner(running: Running) -> int:
    """The PID here of what is PID 1 there."""
    return int(Path(f"/proc/{running.process.pid}/task/{running.process.pid}/children").read_text())


def goes_to_the_cache(scene: Scene, *codes: str, elsewhere: bool = False) -> Running:
    """It serves on the kernel cache, in its place or, where that cannot be written, in the home."""
    running = scene.restore()
    running.until_ready("cache")
    hard = {(r["rung"], r["code"]) for r in running.report["reasons"] if r["hard"]}
    assert hard == {("process", code) for code in codes}, running.report["reasons"]
    facts = json.loads(running.ask("/facts"))
    place = Path(facts["environment"]["TRITON_CACHE_DIR"])
    assert (place == scene.saved.kernels) != elsewhere
    assert place.is_relative_to(scene.rekindle.home) == elsewhere
    assert facts["cache"] == 2
    assert running.report["cache"]["verdict"] == "hit"
    assert running.end() == LOWER
    scene.nothing_is_left(kept=not elsewhere)
    return running


PRIVILEGED = {
    "as PID 1, with namespaces of its own": PID_1,
    "with what runtimes hide in /proc": mounted(MASKED),
    "without new privileges": ["setpriv", "--no-new-privs"],
    "with little shared memory": mounted("mount -t tmpfs -o size=64k tmpfs /dev/shm"),
    "with control groups of version 2, to be read only": mounted(
        "mount -t cgroup2 -o ro cgroup2 /sys/fs/cgroup"
    ),
    "without control groups": mounted("mount -t tmpfs -o ro tmpfs /sys/fs/cgroup"),
    "with processes of others hidden": mounted("mount -t proc -o hidepid=2 proc /proc"),
    "with a filter of system calls": filtered(
        "kexec_load", "keyctl", "bpf", "open_by_handle_at", "userfaultfd"
    ),
}


@pytest.mark.parametrize("name", PRIVILEGED)
def test_a_privileged_container_restores_the_process(saved: Saved, tmp_path: Path, name: str) -> None:
    with container(saved, tmp_path, PRIVILEGED[name]) as scene:
        is_restored(scene)
        scene.nothing_is_left()


def test_five_capabilities_are_enough_for_a_server_that_had_no_more(
    saved_with_few: Saved, tmp_path: Path
) -> None:
    with container(saved_with_few, tmp_path, [*PID_1, *has(*NEEDED)]) as scene:
        is_restored(scene)
        scene.nothing_is_left()


def test_a_filter_of_system_calls_and_few_capabilities_are_enough(
    saved_with_few: Saved, tmp_path: Path
) -> None:
    prefix = [*mounted(MASKED), *has(*NEEDED), *filtered("kexec_load")]
    with container(saved_with_few, tmp_path, prefix) as scene:
        is_restored(scene)
        scene.nothing_is_left()


def test_a_snapshot_behind_a_filter_is_refused_before_the_server_starts(scene: Scene) -> None:
    scene.rekindle.prefix = filtered("kexec_load")
    started = scene.directory / "started"
    command = ["sh", "-c", f"touch {started}; exec sleep 60"]
    done = scene.rekindle("snapshot", "image", "--ready-url", "http://127.0.0.1:9/", "--", *command)
    assert (done.status, started.exists()) == (10, False), done.stderr
    assert "seccomp" in done.stderr


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesser:
    """A container in which a process that had all capabilities cannot be restored, and the codes for that."""

    prefix: Sequence[str]
    codes: Sequence[str]


LESSER = {
    "as runtimes make it": Lesser(
        prefix=[*mounted(MASKED), *has(*DEFAULT)], codes=["privileges", "capabilities"]
    ),
    "without SYS_ADMIN": Lesser(prefix=lacks("sys_admin"), codes=["privileges", "capabilities"]),
    "without NET_ADMIN": Lesser(prefix=lacks("net_admin"), codes=["privileges", "capabilities"]),
    "without SYS_TIME": Lesser(prefix=lacks("sys_time"), codes=["privileges", "capabilities"]),
    "without SYS_CHROOT": Lesser(prefix=lacks("sys_chroot"), codes=["criu", "capabilities"]),
    "with fewer than the server had": Lesser(prefix=has(*NEEDED), codes=["capabilities"]),
    "without SETPCAP": Lesser(prefix=lacks("setpcap"), codes=["criu", "capabilities"]),
    "with a filter of system calls that cells need": Lesser(prefix=filtered("unshare"), codes=["privileges"]),
}


@pytest.mark.parametrize("name", LESSER)
def test_a_container_with_less_serves_on_the_cache(saved: Saved, tmp_path: Path, name: str) -> None:
    lesser = LESSER[name]
    with container(saved, tmp_path, lesser.prefix) as scene:
        running = goes_to_the_cache(scene, *lesser.codes)
        assert running.report["seconds"] < 10


USER_NAMESPACE = ["unshare", "--user", "--map-root-user", *PID_1[1:]]


def test_a_user_namespace_serves_on_the_cache(saved: Saved, tmp_path: Path) -> None:
    with container(saved, tmp_path, USER_NAMESPACE) as scene:
        goes_to_the_cache(scene, "criu")


def test_a_user_namespace_serves_on_the_cache_that_is_asked_for(saved: Saved, tmp_path: Path) -> None:
    with container(saved, tmp_path, USER_NAMESPACE) as scene:
        running = scene.restore("--rung", "cache")
        running.until_ready("cache")
        assert running.end() == 0
        scene.nothing_is_left(kept=True)


def test_another_user_than_root_is_served_on_the_cache(saved: Saved) -> None:
    user = 1000
    prefix = ["setpriv", "--reuid", str(user), "--clear-groups"]
    # Python may lie in root's home directory, which this lets it read.
    prefix += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    with (
        tempfile.TemporaryDirectory(dir="/var/tmp") as place,
        container(saved, Path(place), prefix) as scene,
    ):
        for path in (scene.directory, *scene.directory.rglob("*")):
            os.chown(path, user, user)
        running = goes_to_the_cache(scene, "privileges", "capabilities", elsewhere=True)
        (told,) = [r for r in running.report["reasons"] if r["code"] == "privileges"]
        assert told["here"] == "running as user 1000, not as root"


# Where nothing can be written.


# /tmp may be, or hold, file systems of its own.
_TMP_READ_ONLY = """
mount --rbind /tmp /tmp
while read -r _ point _; do
    case $point in
        PLACE | PLACE/*) ;;
        /tmp | /tmp/*) mount -o remount,bind,ro "$point" ;;
    esac
done </proc/mounts
"""


def read_only(scene: Scene, before: str = "", *, tmp: bool = False) -> list[str]:
    """The root's file system cannot be written, nor, unless `tmp` says so, /tmp, but for the directory of
    the test."""
    place = scene.directory
    script = [f"mount --bind {place} {place}", before]
    script += [] if tmp else [_TMP_READ_ONLY.replace("PLACE", str(place))]
    return mounted("\n".join([*script, "mount -o remount,bind,ro /"]))


@pytest.fixture(name="scene")
def _scene(saved: Saved, tmp_path: Path) -> Iterator[Scene]:
    with container(saved, tmp_path, []) as made:
        yield made


def test_a_read_only_root_restores_the_process_with_a_home_and_a_tmp(scene: Scene) -> None:
    scene.rekindle.prefix = read_only(scene, tmp=True)
    is_restored(scene)
    scene.nothing_is_left()


def test_without_a_tmp_that_can_be_written_there_is_no_criu(scene: Scene) -> None:
    scene.rekindle.prefix = read_only(scene)
    running = goes_to_the_cache(scene, "criu", elsewhere=True)
    assert "kerndat" in running.report["reasons"][0]["here"]


def test_a_home_in_memory_will_do(scene: Scene) -> None:
    scene.rekindle.prefix = read_only(scene, f"mount -t tmpfs tmpfs {scene.rekindle.home}")
    running = scene.restore("--rung", "cache")
    running.until_ready("cache")
    assert running.end() == 0
    scene.nothing_is_left()


@pytest.mark.parametrize("there", [True, False], ids=["a home that was used", "none"])
def test_without_a_home_the_command_is_started_cold(scene: Scene, there: bool) -> None:
    home = scene.rekindle.home
    if there:
        assert scene.rekindle("doctor", "--check", "root").status == 0
    else:
        scene.rekindle.home = home = Path("/no/such/home")
    scene.rekindle.prefix = read_only(scene, f"test ! -d {home} || mount -t tmpfs -o ro tmpfs {home}")
    running = scene.restore(
        *("--ready-url", f"http://127.0.0.1:{scene.saved.port}/health"),
        command=[*MULE, str(scene.saved.port)],
    )
    running.until_ready("cold")
    assert running.reasons == [("process", "capability"), ("cache", "capability")]
    assert "WARNING: cold start: " in running.said
    assert "Read-only file system" in running.said
    assert running.end() == LOWER
    running = scene.ended()
    assert running.process.returncode == 10, running.said
    assert "Traceback" not in running.said
    scene.nothing_is_left()
