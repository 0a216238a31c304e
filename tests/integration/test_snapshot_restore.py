# SPDX-License-Identifier: Apache-2.0
"""Snapshot and restore of a server that is not vLLM, with real CRIU."""

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import KeyPair, Rekindle, Replica, free_port, wait_for, workhorse, workhorse_flags

pytestmark = pytest.mark.criu
Restore = Callable[..., Replica]


def test_a_restored_server_goes_on_where_it_was(
    rekindle: Rekindle, restore: Restore, port: int, nothing_left: Callable[[], None]
) -> None:
    done = rekindle.snapshot_workhorse("horse", port, flags=["--json"])
    assert done.status == 0, done.stderr
    report = done.json
    assert report["outcome"] == "saved"
    assert report["oracle"]["match"] is True
    assert report["bytes"]["written"] < report["bytes"]["dump"]
    accounted = sum(phase["seconds"] for phase in report["phases"]) + report["unaccounted_seconds"]
    assert abs(report["seconds"] - accounted) < 1e-3

    replica = restore("horse", port)
    assert replica.report["outcome"] == "restored"
    assert replica.ask("/count", {}) == "1"
    assert replica.ask("/count", {}) == "2"
    facts = json.loads(replica.ask("/facts"))
    assert facts["pid"] > 1000
    assert facts["child"] == "pong", "the child's pages are not what they were"
    assert facts["shared"] == "hello"
    assert facts["zeros"] is True
    assert facts["timer"] is True, "it had expired, and then stood still"
    assert facts["deleted"] == "ghost"
    assert facts["io_uring_errno"] == errno.ENOSYS, "the system call filter is gone"
    assert facts["hash_seed"] == "0"
    replica.kill()
    nothing_left()


def test_ten_restores_each_after_kill_9_of_the_last(
    rekindle: Rekindle, restore: Restore, horse_port: int, nothing_left: Callable[[], None]
) -> None:
    for _ in range(10):
        replica = restore("horse", horse_port)
        assert replica.report["oracle"]["match"] is True
        assert replica.ask("/count", {}) == "1"
        replica.kill()
    nothing_left()


def test_two_replicas_of_one_snapshot_on_one_host(
    rekindle: Rekindle, restore: Restore, horse_port: int
) -> None:
    first, second = restore("horse", horse_port), restore("horse", free_port())
    assert [first.ask("/count", {}) for _ in range(3)] == ["1", "2", "3"]
    assert second.ask("/count", {}) == "1"
    assert "data: 4" in first.ask("/stream?n=5")
    with ThreadPoolExecutor(8) as pool:
        streams = list(pool.map(lambda r: r.ask("/stream?n=20"), [first, second] * 4))
    assert all(stream.count("data:") == 20 for stream in streams)


def test_the_published_port_carries_much_both_ways_and_streams(
    rekindle: Rekindle, restore: Restore, horse_port: int
) -> None:
    replica = restore("horse", horse_port)
    assert replica.ask("/upload", "x" * 20_000_000) == str(20_000_002)
    began = time.monotonic()
    import urllib.request

    with urllib.request.urlopen(f"http://127.0.0.1:{horse_port}/stream?n=20", timeout=30) as response:
        response.readline()
        first = time.monotonic() - began
        response.read()
    assert first < (time.monotonic() - began) / 2, "the stream was held back to its end"


def test_without_publish_the_port_is_where_the_server_listened(
    rekindle: Rekindle, horse_port: int, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    process = rekindle.spawn("restore", "horse", "--report", str(report), log=tmp_path / "log")
    try:
        wait_for(report.exists, 30)
        assert json.loads(report.read_text())["endpoint"] == f"127.0.0.1:{horse_port}"
    finally:
        process.kill()
        process.wait()


def test_clocks_go_on_from_the_snapshot(rekindle: Rekindle, restore: Restore, horse_port: int) -> None:
    record = rekindle("inspect", "horse", "--json").json["record"]["process"]
    time.sleep(2.5)
    facts = json.loads(restore("horse", horse_port).ask("/facts"))
    for clock in ("monotonic", "boottime"):
        passed = facts[clock] - record[f"{clock}_ns"] / 1e9
        assert 0 <= passed < 2, f"{clock} jumped by {passed} s"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_server_and_its_status_is_ours(
    rekindle: Rekindle, restore: Restore, horse_port: int, signum: int, nothing_left: Callable[[], None]
) -> None:
    replica = restore("horse", horse_port)
    replica.process.send_signal(signum)
    assert replica.process.wait(20) == 7
    assert f"workhorse: signal {int(signum)}" in replica.log.read_text()
    nothing_left()


def test_a_restored_server_writes_to_our_stdout_and_stderr(
    rekindle: Rekindle, restore: Restore, horse_port: int, tmp_path: Path
) -> None:
    replica = restore("horse", horse_port)
    replica.ask("/count", {})
    wait_for(lambda: "count 1" in replica.log.read_text(), 5)
    assert "serving" not in replica.log.read_text(), "what was written before the snapshot came again"


def test_replicas_have_terminals_of_the_same_number(rekindle: Rekindle, restore: Restore, port: int) -> None:
    done = rekindle.snapshot_workhorse("terminal", port, "hold=terminal")
    assert done.status == 0, done.stderr
    terminals = [os.openpty() for _ in range(3)]
    try:
        replicas = [restore("terminal", free_port()) for _ in range(2)]
        assert [replica.ask("/count", {}) for replica in replicas] == ["1", "1"]
    finally:
        for fd in itertools.chain.from_iterable(terminals):
            os.close(fd)


def test_the_hosts_network_can_be_kept(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    done = rekindle.snapshot_workhorse("horse", port, flags=["--network", "host"])
    assert done.status == 0, done.stderr
    report = tmp_path / "report.json"
    process = rekindle.spawn("restore", "horse", "--report", str(report), log=tmp_path / "log")
    try:
        wait_for(lambda: report.exists() or process.poll() is not None, 30)
        replica = Replica(process, port, tmp_path / "log", {})
        assert replica.ask("/count", {}) == "1"
    finally:
        process.kill()
        process.wait()
    assert rekindle("restore", "horse", "--publish", str(free_port())).status == 2
    assert rekindle("match", "horse").status == 0
    with socket.create_server(("127.0.0.1", port)):
        done = rekindle("match", "horse")
        assert done.status == 3
        assert f"port: address was 127.0.0.1:{port}, is Address already in use" in done.stdout


def test_an_image_in_a_layout_directory(
    rekindle: Rekindle, restore: Restore, key_pair: KeyPair, port: int, tmp_path: Path
) -> None:
    image = f"oci:{tmp_path / 'layout'}:v1"
    assert rekindle.snapshot_workhorse(image, port, flags=key_pair.sign).status == 0
    index = json.loads((tmp_path / "layout" / "index.json").read_text())
    tags = [m.get("annotations", {}).get("org.opencontainers.image.ref.name") for m in index["manifests"]]
    assert [tag for tag in tags if tag] == ["v1"]
    assert restore(image, port, *key_pair.verify).ask("/count", {}) == "1"


def test_a_layout_on_another_disk(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    from tests.conftest import small_disk

    with small_disk(tmp_path / "disk", "256m"):
        image = f"oci:{tmp_path / 'disk' / 'layout'}:v1"
        assert rekindle.snapshot_workhorse(image, port).status == 0
        assert rekindle("inspect", image).status == 0


def test_a_new_snapshot_replaces_the_old_and_frees_its_blobs(rekindle: Rekindle, port: int) -> None:
    digests = set()
    for _ in range(2):
        done = rekindle.snapshot_workhorse("horse", port, flags=["--json"])
        assert done.status == 0, done.stderr
        digests.add(done.json["image"]["digest"])
    assert len(digests) == 2
    blobs = list((rekindle.home / "store" / "blobs" / "sha256").iterdir())
    layers = rekindle("inspect", "horse", "--json").json["process_image"]["layers"]
    signatures = 5  # two bundles, their manifests, and the empty config that these share
    assert len(blobs) == len(layers) + 3 + signatures  # 3: index, manifest, record


def test_dumps_that_were_not_used_for_longest_make_room(
    rekindle: Rekindle, restore: Restore, port: int
) -> None:
    for name in ("one", "two", "three"):
        assert rekindle.snapshot_workhorse(name, port).status == 0
    dumps = rekindle.home / "dumps"
    kept = [path for path in dumps.iterdir() if path.is_dir()]
    assert len(kept) == 3
    rekindle.env["REKINDLE_DUMPS_LIMIT"] = "0.05"  # GiB: room for one and a half
    replica = restore("one", port)
    digest = rekindle("inspect", "one", "--json").json["process_image"]["digest"].removeprefix("sha256:")
    left = {path.name for path in dumps.iterdir() if path.is_dir()}
    assert digest in left
    assert len(left) < 3
    replica.kill()
    assert restore("two", port).ask("/count", {}) == "1", "an evicted dump is unpacked again"


def test_requests_from_a_file_warm_the_server(
    rekindle: Rekindle, restore: Restore, port: int, tmp_path: Path
) -> None:
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"method": "POST", "path": "/count", "body": {}}\n' * 5)
    done = rekindle.snapshot_workhorse("horse", port, flags=["--warm-requests", str(requests)])
    assert done.status == 0, done.stderr
    assert restore("horse", port).ask("/count", {}) == "6"


def test_a_home_with_an_odd_name_behind_a_symbolic_link(
    rekindle: Rekindle, restore: Restore, port: int, tmp_path: Path
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    rekindle.home = tmp_path / "link" / os.fsdecode(b"a:h me\xff")
    assert rekindle.snapshot_workhorse("horse", port).status == 0
    assert restore("horse", port).ask("/count", {}) == "1"


def test_the_environment_reaches_the_server_whole(rekindle: Rekindle, restore: Restore, port: int) -> None:
    environment = {"odd.name": "kept", "LARGE": "x" * 100_000, "LARGE2": "x" * 100_000, "L3": "x" * 100_000}
    done = rekindle.snapshot_workhorse("horse", port, env=environment)
    assert done.status == 0, done.stderr
    facts = json.loads(restore("horse", port).ask("/facts"))
    assert facts["odd"] == "kept"
    assert facts["large"] == 100_000


def test_the_port_is_open_when_the_report_is_there(
    rekindle: Rekindle, horse_port: int, tmp_path: Path
) -> None:
    for number in range(5):
        report = tmp_path / f"report-{number}"
        process = rekindle.spawn("restore", "horse", "--report", str(report), log=tmp_path / "log")
        try:
            wait_for(report.exists, 30)
            assert Replica(process, horse_port, tmp_path / "log", {}).ask("/count", {}) == "1"
        finally:
            process.kill()
            process.wait()


def test_readers_of_the_store_do_not_wait_for_each_other(rekindle: Rekindle, horse_port: int) -> None:
    import fcntl

    with open(rekindle.home / "store" / ".reading", "w") as unpacking:
        fcntl.flock(unpacking, fcntl.LOCK_SH)
        began = time.monotonic()
        assert rekindle("inspect", "horse").status == 0
        assert rekindle.snapshot_workhorse("horse", horse_port, flags=["--no-prove"]).status == 0
        assert time.monotonic() - began < 20


def test_closed_standard_files_do_no_harm(rekindle: Rekindle, horse_port: int, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    rekindle.prefix = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    process = rekindle.spawn("restore", "horse", "--report", str(report), log=tmp_path / "log")
    replica = Replica(process, horse_port, tmp_path / "log", {})
    try:
        wait_for(lambda: _answers(replica), 30)
    finally:
        replica.kill()


def test_json_keeps_stdout_for_the_report(rekindle: Rekindle, horse_port: int, tmp_path: Path) -> None:
    with open(tmp_path / "stdout", "wb") as stdout:
        process = rekindle.spawn("restore", "horse", "--json", log=tmp_path / "stderr", stdout=stdout)
    wait_for(lambda: (tmp_path / "stdout").read_text().endswith("}\n"), 30)
    replica = Replica(process, horse_port, tmp_path / "stderr", {})
    wait_for(lambda: _answers(replica), 10)
    process.kill()
    process.wait()
    assert json.loads((tmp_path / "stdout").read_text())["outcome"] == "restored"
    assert "count 1" in (tmp_path / "stderr").read_text()


def _answers(replica: Replica) -> bool:
    try:
        return replica.ask("/count", {}) == "1"
    except OSError:
        return False


def test_bench_measures_every_start_and_draws_it(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    picture = tmp_path / "bench.svg"
    done = rekindle(
        *("bench", "--runs", "2", "--replicas", "3,1", "--delta", "--json", "--picture", str(picture)),
        *(*workhorse_flags(port), "--", *workhorse(port)),
    )
    assert done.status == 0, done.stderr
    document = done.json
    assert document["schema"] == "rekindle.bench/1"
    assert set(document["starts"]) == {
        *("cold", "warm-cache", "process", "process-cold-page-cache", "criu-plain"),
        *("process-copied", "process-delta"),
    }
    for start in document["starts"].values():
        times = start["first_token_seconds"]
        assert times["min"] <= times["median"] <= times["max"]
        assert times["min"] - 1e-3 <= sum(start["phases"].values()) <= times["max"] + 1e-3
    assert document["image_bytes"] < document["dump_bytes"]
    assert [(each["n"], each["memory"]) for each in document["replicas"]] == [
        (1, "copied"),
        (1, "mapped"),
        (3, "mapped"),
    ]
    copied, one, three = (each["memory_bytes"] for each in document["replicas"])
    assert one < three < 3 * copied
    delta = document["delta"]
    assert 0 < delta["dump_seconds"] < delta["save_seconds"]
    assert 0 < delta["image_bytes"] < delta["dump_bytes"] < document["dump_bytes"]
    assert picture.read_text().count("<rect") > 10
    assert not list((rekindle.home / "run").iterdir())


def test_the_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("rekindle")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rekindle ")
