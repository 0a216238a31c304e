# SPDX-License-Identifier: Apache-2.0
"""A restored server has the limits and places of a start here, and what it set itself."""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS, Done, Rekindle, Replica, workhorse_flags
from tests.conftest import need as need_capability

pytestmark = pytest.mark.criu
Restore = Callable[..., Replica]
CPUS = sorted(os.sched_getaffinity(0))
OPEN_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)


def try_snapshot(rekindle: Rekindle, port: int, *what: str) -> Done:
    """Snapshot a setter as `setter`."""
    server = [sys.executable, str(SERVERS / "setter.py"), str(port), *what]
    flags = ["--ready-url", f"http://127.0.0.1:{port}/", *workhorse_flags(port)[2:]]
    return rekindle("snapshot", "setter", "--json", "--no-prove", "--no-cache", *flags, "--", *server)


def snapshot(rekindle: Rekindle, port: int, *what: str, prefix: list[str] | None = None) -> dict[str, Any]:
    """Snapshot a setter, with a rekindle started by a prefix; return the report."""
    rekindle.prefix = prefix or []
    done = try_snapshot(rekindle, port, *what)
    rekindle.prefix = []
    assert done.status == 0, done.stderr
    report: dict[str, Any] = done.json
    return report


def restored(rekindle: Rekindle, restore: Restore, port: int, *prefix: str) -> tuple[Replica, dict[str, Any]]:
    """Restore it with a rekindle started by a prefix; return the replica and its settings."""
    rekindle.prefix = list(prefix)
    replica = restore("setter", port)
    rekindle.prefix = []
    settings: dict[str, Any] = json.loads(replica.ask("/settings"))
    return replica, settings


def hard_reasons(rekindle: Rekindle, *prefix: str) -> dict[str, str]:
    """What `match` says against the process rung, by code, where rekindle is started by a prefix."""
    rekindle.prefix = list(prefix)
    done = rekindle("match", "setter", "--json")
    rekindle.prefix = []
    step = done.json["steps"][0]
    return {each["code"]: each["field"] + " " + each["here"] for each in step["reasons"] if each["hard"]}


def told(report: dict[str, Any]) -> dict[str, bool]:
    """The codes of a report's reasons, and whether they are hard."""
    return {each["code"]: each["hard"] for each in report["reasons"] if each["code"] != "not-proved"}


def test_what_a_server_inherited_is_that_of_today(rekindle: Rekindle, restore: Restore, port: int) -> None:
    """A snapshot job is the first victim when memory runs out, nice, and has other limits."""
    job = ["choom", "-n", "1000", "--", "nice", "-n", "7", "prlimit", "--nofile=3000:4000", "--core=1:2"]
    snapshot(rekindle, port, prefix=[*job, "ionice", "-c", "3"])
    _, found = restored(rekindle, restore, port)
    assert found["oom"] == int(Path("/proc/self/oom_score_adj").read_text())
    assert found["limits"]["RLIMIT_NOFILE"] == list(OPEN_FILES)
    assert found["limits"]["RLIMIT_CORE"] == list(resource.getrlimit(resource.RLIMIT_CORE))
    for thread in found["threads"].values():
        assert (thread["nice"], thread["ionice"]) == (os.getpriority(os.PRIO_PROCESS, 0), 0)


def test_what_a_server_inherits_today_is_not_that_of_the_snapshot(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    snapshot(rekindle, port)
    today = ["choom", "-n500", "--", "nice", "-n5", "prlimit", "--nofile=900:999", "--fsize=123456789"]
    umask = ["sh", "-c", 'umask 77; exec "$@"', "sh"]
    _, found = restored(rekindle, restore, port, *today, "ionice", "-c", "3", *umask)
    assert found["oom"] == 500
    assert found["limits"]["RLIMIT_NOFILE"] == [900, 999]
    assert found["limits"]["RLIMIT_FSIZE"] == [123456789, 123456789]
    assert found["umask"] == "077"
    for thread in found["threads"].values():
        assert (thread["nice"], thread["ionice"]) == (5, 3)


def test_what_a_server_set_itself_stays(rekindle: Rekindle, restore: Restore, port: int) -> None:
    what = ["limit=nofile:700:", "limit=core:5:6", "oom=321", "umask=027", "nice=3", "dump=0x7f"]
    snapshot(rekindle, port, *what, "slack=123456", "ionice=2", "batch")
    _, found = restored(rekindle, restore, port, "prlimit", "--nofile=800:1000")
    assert found["limits"]["RLIMIT_NOFILE"] == [700, 1000], "the hard limit was inherited"
    assert found["limits"]["RLIMIT_CORE"] == [5, 6]
    assert (found["oom"], found["umask"], found["dump"]) == (321, "027", "0000007f")
    main, free, batch = (found["threads"][name] for name in ("main", "free", "batch"))
    assert (main["nice"], main["slack"], main["ionice"]) == (3, 123456, 2)
    assert (free["nice"], free["slack"], free["ionice"]) == (0, 50000, 0), "it began before that"
    assert batch["policy"] == os.SCHED_BATCH


def test_programs_that_a_restored_server_starts_have_random_addresses(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    """Itself stays where it is, in a layout that is the same in all snapshots."""
    snapshot(rekindle, port)
    _, found = restored(rekindle, restore, port)
    assert found["personality"] == 0


def test_an_oom_score_of_zero_that_a_server_set_stays(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    snapshot(rekindle, port, "oom=0", prefix=["choom", "-n", "300", "--"])
    _, found = restored(rekindle, restore, port, "choom", "-n", "400", "--")
    assert found["oom"] == 0


def test_bound_threads_are_bound_again_and_others_get_the_cpus_of_today(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    need_capability(len(CPUS) > 1, "two CPUs")
    first, second = CPUS[:2]
    snapshot(rekindle, port, f"bind={second}")
    _, found = restored(rekindle, restore, port)
    assert found["threads"]["bound"]["cpus"] == [second]
    assert found["threads"]["free"]["cpus"] == CPUS
    replica, found = restored(rekindle, restore, port + 1, "taskset", "-c", str(first))
    assert found["threads"]["bound"]["cpus"] == [first]
    assert found["threads"]["free"]["cpus"] == [first]
    assert told(replica.report) == {"cpu-count": False, "cpu-affinity": False}


def test_a_snapshot_on_fewer_cpus_uses_all_of_today(rekindle: Rekindle, restore: Restore, port: int) -> None:
    need_capability(len(CPUS) > 1, "two CPUs")
    snapshot(rekindle, port, f"bind={CPUS[0]}", prefix=["taskset", "-c", str(CPUS[0])])
    _, found = restored(rekindle, restore, port)
    assert [each["cpus"] for each in found["threads"].values()] == [CPUS] * 3


@pytest.mark.parametrize(
    ("what", "today", "field"),
    [
        (["open=200"], ["prlimit", "--nofile=100:100"], "open files of process"),
        (["limit=nofile:5000:"], ["prlimit", "--nofile=1000:2000"], "limit of open files of process"),
        (["lock=4194304"], ["prlimit", "--memlock=1000000:1000000"], ""),  # with CAP_IPC_LOCK
        (
            ["lock=4194304"],
            ["prlimit", "--memlock=1000000:1000000", "setpriv", "--bounding-set=-ipc_lock"],
            "locked memory of process",
        ),
        (
            ["limit=nofile:50:9000"],
            ["prlimit", "--nofile=1000:2000", "setpriv", "--bounding-set=-sys_resource"],
            "limit of open files of process",
        ),
        (["memory=9000000000"], ["prlimit", "--as=9000000000"], "address space of process"),
        ([], ["prlimit", "--as=9000000000"], ""),
    ],
)
def test_a_limit_that_cannot_be_kept_is_told_before_anything_is_fetched(
    rekindle: Rekindle, port: int, what: list[str], today: list[str], field: str
) -> None:
    snapshot(rekindle, port, *what)
    found = hard_reasons(rekindle, *today)
    assert field in found.get("limit", ""), found
    assert bool(field) is ("limit" in found)


def test_a_numa_policy_is_told_where_there_are_other_nodes(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    """On a machine with one node, memory is there whatever the policy says."""
    report = snapshot(rekindle, port, "policy")
    record = rekindle("inspect", "setter", "--json").json["record"]
    assert "bind:0" in {each["memory_policy"] for each in record["process"]["settings"]}
    wanted = {} if record["node"]["memory_nodes"] == "0" else {"memory-policy": False}
    assert told(report) == wanted
    replica, _ = restored(rekindle, restore, port)
    assert told(replica.report) == wanted


def test_options_of_sockets_that_criu_loses_are_set_again(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    snapshot(rekindle, port, "sockets")
    replica, found = restored(rekindle, restore, port)
    assert found["sockets"] == {
        "listening": {
            "TCP_DEFER_ACCEPT": 31,
            "TCP_FASTOPEN": 16,
            "TCP_USER_TIMEOUT": 12345,
            "TCP_MAXSEG": 1000,
            "congestion": "reno",
        },
        "connection": {
            "TCP_USER_TIMEOUT": 54321,
            "TCP_NOTSENT_LOWAT": 16384,
            "TCP_KEEPIDLE": 33,
            "IP_RECVTOS": 1,
        },
        "udp": {"IP_TOS": 16, "IP_RECVTOS": 1},
    }
    assert told(replica.report) == {}


def test_a_pressure_trigger_is_named_before_the_dump(rekindle: Rekindle, port: int) -> None:
    trigger = Path("/proc/pressure/memory")
    need_capability(trigger.exists(), "pressure stall information")
    done = try_snapshot(rekindle, port, f"pressure={trigger}")
    assert done.status == 32, done.stderr
    assert "waits for pressure (psi), which a restored process would not be told" in done.stderr


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("landlock", "has restricted itself with Landlock"),
        ("key", "uses keys of the OS kernel"),
        ("session", "uses keys of the OS kernel"),
    ],
)
def test_what_leaves_no_trace_in_proc_is_named_too(
    rekindle: Rekindle, port: int, what: str, words: str
) -> None:
    done = try_snapshot(rekindle, port, what)
    assert done.status == 32, done.stderr
    assert words in done.stderr


def test_a_helper_that_restricted_itself_and_has_ended_is_no_obstacle(rekindle: Rekindle, port: int) -> None:
    done = try_snapshot(rekindle, port, "child-landlock")
    assert done.status == 0, done.stderr


def test_a_restored_server_may_restrict_itself(rekindle: Rekindle, restore: Restore, port: int) -> None:
    snapshot(rekindle, port)
    replica, _ = restored(rekindle, restore, port)
    assert replica.ask("/restrict") == '"ready"'
