# SPDX-License-Identifier: Apache-2.0
"""Every way to fail that a user can provoke: a clear error, the status of its class, nothing left."""

import json
import platform
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from oci import image as images
from oci import media_types
from oci.layout import Layout
from rekindle.digest import Digest
from restore import dumps
from tests.conftest import (
    OLD_CRIU,
    KeyPair,
    Rekindle,
    need,
    small_disk,
    wait_for,
    workhorse,
    workhorse_flags,
)

pytestmark = pytest.mark.criu
NothingLeft = Callable[[], None]


def only_blob(rekindle: Rekindle, role: str) -> Path:
    layers = rekindle("inspect", "horse", "--json").json["process_image"]["layers"]
    digest = next(x["digest"] for x in layers if x["annotations"]["vnd.rekindle.role"] == role)
    return rekindle.home / "store" / "blobs" / "sha256" / str(digest).removeprefix("sha256:")


def test_an_unprivileged_user(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    assert rekindle.snapshot_workhorse("horse", port).status == 0
    rekindle.prefix = ["unshare", "--user"]  # the same files, but no longer root
    done = rekindle("restore", "horse", "--require", "process")
    assert done.status == 10, done.stderr
    assert "privileges: running as user" in done.stderr
    for words in (
        ["snapshot", "other", *workhorse_flags(port), "--", *workhorse(port)],
        ["bench", *workhorse_flags(port), "--", *workhorse(port)],
    ):
        done = rekindle(*words)
        assert done.status == 10, done.stderr
        assert "must run as root" in done.stderr
        assert "sudo" in done.stderr
    done = rekindle("doctor")
    assert done.status == 10
    assert "FAIL  root" in done.stdout


def test_root_without_the_capability_to_make_namespaces(rekindle: Rekindle, port: int) -> None:
    rekindle.prefix = ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin"]
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 10, done.stderr
    assert "cannot create a cell" in done.stderr
    assert "Operation not permitted" in done.stderr


def test_a_missing_criu(rekindle: Rekindle, port: int, nothing_left: NothingLeft) -> None:
    rekindle.env |= {"REKINDLE_PREFIX": "/no/such/place", "PATH": "/usr/bin:/bin"}
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 10
    assert "CRIU is not installed" in done.stderr
    assert "hack/get-criu" in done.stderr
    doctor = rekindle("doctor", "--check", "criu")
    assert doctor.status == 10
    assert "hack/get-criu" in doctor.stdout
    nothing_left()


def test_a_criu_that_is_too_old_for_this_kernel(rekindle: Rekindle, port: int) -> None:
    """The real thing: Debian 12's CRIU 3.17.1."""
    need(OLD_CRIU.exists(), "an old CRIU")
    if tuple(map(int, platform.release().split(".")[:2])) < (6, 16):
        pytest.skip("an old CRIU works on this kernel")
    rekindle.env["REKINDLE_CRIU"] = str(OLD_CRIU)
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 10
    assert "CRIU 3.17.1" in done.stderr
    assert "does not work on Linux" in done.stderr
    assert rekindle("doctor", "--check", "criu").status == 10


@pytest.mark.parametrize("size", ["1m", "8m", "20m", "30m"])
def test_a_full_disk(
    rekindle: Rekindle, port: int, tmp_path: Path, size: str, nothing_left: NothingLeft
) -> None:
    """At each size another step runs out of room: CRIU's dump, packing, unpacking."""
    with small_disk(tmp_path / "disk", size):
        rekindle.home = tmp_path / "disk"
        done = rekindle.snapshot_workhorse("horse", port)
        assert done.status == 14, done.stderr
        assert "no space left" in done.stderr
        failed_dumping = "rekindle: check" in done.stderr and "rekindle: dump" not in done.stderr
        assert ("server: it still answered" in done.stderr) == failed_dumping
        assert rekindle("inspect", "horse").status == 12
        assert not list((rekindle.home / "run").iterdir())
    rekindle.home = tmp_path / "none"
    nothing_left()


@pytest.mark.parametrize(("room", "status"), [("8m", 11), ("200m,nr_inodes=70", 14)])
def test_a_full_disk_at_restore(
    rekindle: Rekindle, port: int, key_pair: KeyPair, tmp_path: Path, room: str, status: int
) -> None:
    """Too few bytes are seen when deciding, too few inodes are not."""
    image = f"oci:{tmp_path / 'layout'}"
    assert rekindle.snapshot_workhorse(image, port, flags=key_pair.sign).status == 0
    with small_disk(tmp_path / "disk", room):
        rekindle.home = tmp_path / "disk"
        done = rekindle("restore", image, *key_pair.verify, "--require", "process")
        assert done.status == status, done.stderr
        assert not list((rekindle.home / "run").iterdir())
        assert not [path for path in (rekindle.home / "dumps").iterdir() if path.is_dir()]


@pytest.mark.parametrize("role", ["metadata", "pages"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "longer", "missing"])
def test_a_damaged_blob_is_never_restored(
    rekindle: Rekindle, horse_port: int, role: str, damage: str, nothing_left: NothingLeft
) -> None:
    blob = only_blob(rekindle, role)
    content = bytearray(blob.read_bytes())
    match damage:
        case "truncated":
            blob.write_bytes(content[: len(content) // 2])
        case "empty":
            blob.write_bytes(b"")
        case "flipped":
            content[len(content) // 2] ^= 0x40
            blob.write_bytes(content)
        case "longer":
            blob.write_bytes(content + b"\0")
        case "missing":
            blob.unlink()
    done = rekindle("restore", "horse")
    assert done.status == 21, done.stderr
    assert "sha256:" in done.stderr
    assert not [path for path in (rekindle.home / "dumps").iterdir() if path.is_dir()]
    nothing_left()


def rewrite_record(rekindle: Rekindle, change: Callable[[dict[str, object]], None]) -> None:
    """Publishes an image whose record says something else, with every digest right."""
    layout = Layout(rekindle.home / "store")
    old = images.load(layout, layout.resolve("horse:latest"))
    document = json.loads(old.record.to_bytes())
    change(document)
    config = layout.put(json.dumps(document).encode(), media_types.RECORD)
    manifest = json.loads(layout.read(old.process, limit_bytes=1 << 20))
    manifest["config"] = config.to_json()
    process = layout.put(
        json.dumps(manifest).encode(), media_types.MANIFEST, artifact_type=media_types.PROCESS
    )
    index = json.loads(layout.read(old.index, limit_bytes=1 << 20))
    index["manifests"] = [process.to_json()]
    root = layout.put(json.dumps(index).encode(), media_types.INDEX, artifact_type=media_types.SNAPSHOT)
    layout.publish(layout, root, "horse:latest")


def test_a_record_of_a_newer_format(rekindle: Rekindle, horse_port: int) -> None:
    rewrite_record(rekindle, lambda record: record.update(schema="rekindle.record/99"))
    for words in (["restore", "horse", "--dangerously-skip-verification"], ["inspect", "horse"]):
        done = rekindle(*words)
        assert done.status == 20, done.stderr
        assert "rekindle.record/99" in done.stderr
        assert "newer rekindle" in done.stderr


def test_a_node_of_another_kind(
    rekindle: Rekindle, horse_port: int, key_pair: KeyPair, nothing_left: NothingLeft
) -> None:

    def other_node(record: dict[str, object]) -> None:
        record["node"]["cpu_features"] += ["amx_flux"]  # type: ignore[index]
        record["mapped_files"] += [  # type: ignore[operator]
            {"path": "/no/such/library.so", "size": 1},
            {"path": "/etc/hostname", "size": 123456},
        ]
        record["node"]["kernel"] = "1.0"  # type: ignore[index]

    rewrite_record(rekindle, other_node)
    assert rekindle("restore", "horse").status == 22, "it is signed no more"
    assert rekindle("sign", "horse", *key_pair.sign).status == 0
    done = rekindle("restore", "horse", *key_pair.verify, "--require", "process", "--json")
    assert done.status == 11, done.stderr
    assert "amx_flux" in done.stderr
    reasons = {(r["code"], r["hard"]) for r in done.json["reasons"]}
    assert reasons - {("not-proved", False)} == {
        ("cpu-feature", True),
        ("rootfs-file", True),
        ("kernel", False),
    }
    assert done.json["error"]["code"] == "mismatch"
    shown = rekindle("inspect", "horse")
    assert "fits here   no" in shown.stdout
    assert "/no/such/library.so" in shown.stdout
    nothing_left()


def test_a_port_in_use(rekindle: Rekindle, horse_port: int, nothing_left: NothingLeft) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        done = rekindle("restore", "horse", "--publish", str(taken))
    assert done.status == 13, done.stderr
    assert f"cannot publish 127.0.0.1:{taken}" in done.stderr
    assert "Address already in use" in done.stderr
    nothing_left()


def test_an_image_that_was_not_proved_says_so(rekindle: Rekindle, port: int) -> None:
    proved = rekindle.snapshot_workhorse("proved", port)
    not_proved = rekindle.snapshot_workhorse("not-proved", port, flags=["--no-prove"])
    assert (proved.status, not_proved.status) == (0, 0), proved.stderr + not_proved.stderr
    assert rekindle("inspect", "not-proved", "--json").json["record"]["proved"] is False
    assert "not-proved" not in rekindle("match", "proved").stdout
    shown = rekindle("match", "not-proved")
    assert shown.status == 0
    assert "not-proved" in shown.stdout


def test_a_server_that_never_gets_ready(rekindle: Rekindle, port: int, nothing_left: NothingLeft) -> None:
    done = rekindle.snapshot_workhorse("horse", port, "never-ready", flags=["--ready-timeout", "1"])
    assert done.status == 31, done.stderr
    assert "not ready after 1 s" in done.stderr
    assert "workhorse: serving" in done.stderr, "its last words are missing"
    nothing_left()


@pytest.mark.parametrize(
    ("url", "cause", "hint"),
    [
        ("http://127.0.0.1:{port}/healthz", "/healthz was answered with status 404", "--ready-url"),
        ("http://127.0.0.1:1/health", "GET http://127.0.0.1:1/health: Connection refused", "one in its log"),
    ],
)
def test_a_wrong_ready_url(rekindle: Rekindle, port: int, url: str, cause: str, hint: str) -> None:
    wrong = ["--ready-timeout", "1", "--ready-url", url.format(port=port)]
    done = rekindle.snapshot_workhorse("horse", port, flags=wrong)
    assert done.status == 31, done.stderr
    assert cause in done.stderr
    assert hint in done.stderr.split("hint:")[1]


def test_a_server_that_dies_before_it_is_ready(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    done = rekindle("snapshot", "horse", *workhorse_flags(port), "--", "sh", "-c", "echo no oats; exit 9")
    assert done.status == 30, done.stderr
    assert "status 9" in done.stderr
    assert "no oats" in done.stderr


@pytest.mark.parametrize("last", [1, 2])
def test_the_log_that_is_named_has_the_last_words(rekindle: Rekindle, port: int, last: int) -> None:
    script = f"echo first >&{3 - last}; sleep 0.1; echo no oats >&{last}; exit 9"
    done = rekindle("snapshot", "horse", *workhorse_flags(port), "--", "sh", "-c", script)
    log = next(line for line in done.stderr.splitlines() if "log:" in line).split()[-1]
    assert Path(log).read_text() == "no oats\n"


def test_a_server_that_dies_while_it_warms(rekindle: Rekindle, port: int, nothing_left: NothingLeft) -> None:
    done = rekindle.snapshot_workhorse("horse", port, "dies-warming")
    assert done.status == 30, done.stderr
    assert "status 3" in done.stderr
    assert "out of oats" in done.stderr
    log = next(line for line in done.stderr.splitlines() if "log:" in line).split()[-1]
    assert "out of oats" in Path(log).read_text(), "the log that the error names is not there"
    nothing_left()


def test_an_oracle_that_answers_differently(rekindle: Rekindle, port: int, nothing_left: NothingLeft) -> None:
    done = rekindle.snapshot_workhorse("horse", port, "moody")
    assert done.status == 35, done.stderr
    assert "gave two answers to the same request" in done.stderr
    assert rekindle("inspect", "horse").status == 12
    nothing_left()


def test_a_restored_server_that_answers_differently(
    rekindle: Rekindle, port: int, tmp_path: Path, nothing_left: NothingLeft
) -> None:
    (tmp_path / "answer").write_text("yes")
    assert rekindle.snapshot_workhorse("horse", port, f"file={tmp_path / 'answer'}").status == 0
    (tmp_path / "answer").write_text("no!")
    done = rekindle("restore", "horse", "--require", "process", "--json")
    assert done.status == 11, done.stderr
    assert [reason["code"] for reason in done.json["reasons"]] == ["named-file"]
    (rekindle.home / "policy.toml").write_text('[match]\nsoft = ["named-file"]\n')
    done = rekindle("restore", "horse", "--require", "process", "--json")
    assert done.status == 35, done.stderr
    assert done.json["oracle"]["match"] is False
    assert done.json["outcome"] == "failed"
    nothing_left()


def test_criu_fails_at_dump(rekindle: Rekindle, port: int, tmp_path: Path, nothing_left: NothingLeft) -> None:
    """A CRIU that passes its trial, and fails at the real thing."""
    real = rekindle("doctor", "--check", "criu", "--json").json["checks"][0]["path"]
    criu = tmp_path / "criu"
    criu.write_text(f"""#!/bin/sh
case "$*" in
"dump "*/run/snapshot-*)
    for word; do case "$word" in --images-dir=*) directory=${{word#*=}};; esac; done
    echo "(00.1) Error (criu/mem.c:1): the dog ate it" >"$directory/dump.log"
    exit 1;;
esac
exec {real} "$@"
""")
    criu.chmod(0o755)
    rekindle.env["REKINDLE_CRIU"] = str(criu)
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 33, done.stderr
    assert "the dog ate it" in done.stderr
    assert "server: it still answered, and was ended, since this command had started it" in done.stderr
    assert "ran:" in done.stderr, "the command to replay is missing"
    log = next(line for line in done.stderr.splitlines() if "log:" in line).split()[-1]
    assert "the dog ate it" in Path(log).read_text()
    assert rekindle("inspect", "horse").status == 12
    nothing_left()


def test_criu_fails_at_restore(rekindle: Rekindle, port: int, nothing_left: NothingLeft) -> None:
    """A dump that somebody changed who can also make it look unchanged: CRIU's own words reach the user."""
    assert rekindle.snapshot_workhorse("horse", port).status == 0
    (dump,) = [path for path in (rekindle.home / "dumps").iterdir() if path.is_dir()]
    (dump / "criu" / "pstree.img").write_bytes(b"nonsense")
    layout = Layout(rekindle.home / "store")
    marker = json.loads((dump / "ready.json").read_bytes())
    marker["seal"] = dumps._seal(dump, images.load(layout, layout.resolve("horse:latest")))
    (dump / "ready.json").write_text(json.dumps(marker))
    done = rekindle("restore", "horse", "--require", "process")
    assert done.status == 34, done.stderr
    assert "Error (criu/" in done.stderr
    log = next(line for line in done.stderr.splitlines() if "log:" in line).split()[-1]
    assert Path(log).exists()
    nothing_left()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["restore", "Name"], "invalid image name"),
        (["restore", "registry.example/X"], "invalid image name"),
        (["restore", "oci:/no/such/dir"], "not an OCI image layout"),
        (["restore", "x", "--publish", "99999"], ""),
        (["restore", "x", "--", "frobnicate"], "cannot start frobnicate"),
        (["restore", "x", "--rung", "cache", "--require", "process"], "--rung cache is below"),
        (["restore", "x", "--require", "cold"], "invalid choice"),
        (["restore", "x", "--process-deadline", "0"], "invalid number of seconds '0'"),
        (["restore", "x", "--process-deadline", "soon"], "invalid number of seconds 'soon'"),
        (["restore", "x", "--ready-url", "http://x/"], "--ready-url needs a COMMAND"),
        (["restore", "x", "--ready-file", "/dev/null"], "not a regular file"),
        (["restore", "x", "--ready-file", "/no/such/place/ready"], "cannot use --ready-file"),
        (["snapshot", "x"], "no command"),
        (["snapshot", "x", "--", "frobnicate"], "not a server that rekindle knows"),
        (["snapshot", "x", "--oracle-request", "f", "--", "y"], "--oracle-request needs --ready-url"),
        (["snapshot", "x", "--ready-url", "ftp://x", "--", "y"], "invalid --ready-url"),
        (
            ["snapshot", "x", "--ready-url", "http://x/", "--oracle-request", "/none", "--", "y"],
            "cannot read a request",
        ),
        (["snapshot", "x", "--warm-requests", "/none", "--", "vllm", "serve", "m"], "cannot read requests"),
        (["snapshot", "x", "--", "vllm", "serve", "m", "--port", "0"], "invalid --port"),
        (["snapshot", "x", "--", "vllm", "serve", "m", "--uds", "/s"], "--uds"),
        (["bench", "--runs", "0", "--", "vllm", "serve", "m"], "--runs"),
        (["bench", "--replicas", "1,x", "--", "vllm", "serve", "m"], "--replicas"),
        (["bench", "--replicas", "0,2", "--", "vllm", "serve", "m"], "--replicas"),
        (["frobnicate"], "unknown command 'frobnicate'"),
    ],
)
def test_a_wrong_command_line(rekindle: Rekindle, words: list[str], message: str) -> None:
    done = rekindle(*words)
    assert done.status == (2 if message else 12), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_image_that_is_not_there(rekindle: Rekindle) -> None:
    for verb in ("restore", "inspect"):
        done = rekindle(verb, "nothing")
        assert done.status == 12, done.stderr
        assert "there is no image nothing:latest" in done.stderr


def test_a_command_that_is_not_there(rekindle: Rekindle, port: int) -> None:
    done = rekindle("snapshot", "x", *workhorse_flags(port), "--", "/no/such/server")
    assert done.status == 2
    assert "command not found: /no/such/server" in done.stderr


def test_a_home_that_cannot_be_made(rekindle: Rekindle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    rekindle.home = tmp_path / "file" / "home"
    done = rekindle("inspect", "x")
    assert done.status == 2
    assert "as REKINDLE_HOME" in done.stderr


def test_a_lock_that_is_not_given_back(rekindle: Rekindle, tmp_path: Path) -> None:
    import fcntl

    from rekindle.errors import BusyError
    from rekindle.files import locked

    with open(tmp_path / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with (
            pytest.raises(BusyError, match="another rekindle holds"),
            locked(tmp_path / "lock", timeout=0.05),
        ):
            pass


PHASES = ["find criu", "cell", "ready", "warm", "oracle", "check", "dump", "compact", "pack", "prove"]


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("phase", PHASES)
def test_a_snapshot_that_is_ended_in_any_phase(
    rekindle: Rekindle, port: int, tmp_path: Path, phase: str, signum: int, nothing_left: NothingLeft
) -> None:
    """The store holds the old image, whole; the next command removes what was left."""
    old = rekindle.snapshot_workhorse("horse", port, flags=["--json", "--no-prove"])
    assert old.status == 0, old.stderr
    log = tmp_path / "log"
    process = rekindle.spawn("snapshot", "horse", *workhorse_flags(port), "--", *workhorse(port), log=log)
    wait_for(lambda: f"rekindle: {phase} " in log.read_text() or process.poll() is not None, 60)
    process.send_signal(signum)
    status = process.wait(30)
    if signum == signal.SIGKILL:
        assert rekindle("doctor", "--check", "root").status == 0
    digest = rekindle("inspect", "horse", "--json").json["image"]["digest"]
    if status == 0:  # it was faster than we
        assert digest != old.json["image"]["digest"]
    else:
        assert status == (-signum if signum == signal.SIGKILL else 128 + signum), log.read_text()
        published = digest != old.json["image"]["digest"]
        assert not published or phase == "prove"
    assert_store_is_whole(rekindle)
    nothing_left()


def test_a_second_signal_does_not_stop_the_clean_up(
    rekindle: Rekindle, port: int, tmp_path: Path, nothing_left: NothingLeft
) -> None:
    log = tmp_path / "log"
    process = rekindle.spawn("snapshot", "horse", *workhorse_flags(port), "--", *workhorse(port), log=log)
    wait_for(lambda: "rekindle: ready " in log.read_text(), 60)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        process.send_signal(signum)
    assert process.wait(30) in {129, 130, 143}  # whichever Python came to first
    assert not list((rekindle.home / "run").iterdir())
    nothing_left()


def test_what_a_killed_criu_left_is_removed(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    """Its directory for a trial of the kernel, which a kill at the right millisecond leaves."""
    import tempfile
    import time

    log = tmp_path / "log"
    process = rekindle.spawn("snapshot", "horse", *workhorse_flags(port), "--", *workhorse(port), log=log)
    wait_for(lambda: "rekindle: cell " in log.read_text(), 60)
    process.kill()
    process.wait()
    left = Path(tempfile.mkdtemp(prefix=".criu.move_mount_set_group.", dir="/tmp"))
    time.sleep(0.2)
    assert rekindle("doctor", "--check", "root").status == 0
    assert not left.exists()


def test_nohup_is_heeded(rekindle: Rekindle, port: int, tmp_path: Path) -> None:
    rekindle.prefix = ["nohup"]
    log = tmp_path / "log"
    process = rekindle.spawn("snapshot", "horse", *workhorse_flags(port), "--", *workhorse(port), log=log)
    wait_for(lambda: "rekindle: ready " in log.read_text(), 60)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0, log.read_text()


def test_a_damaged_image_does_not_harm_others(rekindle: Rekindle, horse_port: int) -> None:
    digest = rekindle("inspect", "horse", "--json").json["process_image"]["digest"]
    (rekindle.home / "store" / "blobs" / "sha256" / str(digest).removeprefix("sha256:")).write_bytes(b"")
    done = rekindle.snapshot_workhorse("other", horse_port, flags=["--no-prove"])
    assert done.status == 0, done.stderr
    assert rekindle("inspect", "horse").status == 21
    assert rekindle("inspect", "other").status == 0


def test_a_home_or_model_in_shared_memory_is_refused(rekindle: Rekindle, port: int) -> None:
    done = rekindle("snapshot", "horse", *workhorse_flags(port), "--", *workhorse(port), "/dev/shm/model")
    assert done.status == 2, done.stderr
    assert "could not access /dev/shm/model" in done.stderr
    rekindle.home = Path("/dev/shm/rekindle-home")
    try:
        done = rekindle.snapshot_workhorse("horse", port)
        assert done.status == 2, done.stderr
    finally:
        subprocess.run(["rm", "-rf", rekindle.home], check=True)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("milliseconds", [0, 40, 80, 120, 160, 200, 250, 300, 400])
def test_a_restore_that_is_ended_at_any_moment(
    rekindle: Rekindle,
    horse_port: int,
    tmp_path: Path,
    milliseconds: int,
    signum: int,
    nothing_left: NothingLeft,
) -> None:
    import time

    process = rekindle.spawn("restore", "horse", log=tmp_path / "log")
    time.sleep(milliseconds / 1000)
    process.send_signal(signum)
    status = process.wait(30)
    # SIGTERM meets Python before it has a handler, rekindle, or the server, which then exits with 7.
    assert status in ({-9} if signum == signal.SIGKILL else {-15, 143, 7}), (tmp_path / "log").read_text()
    assert rekindle("doctor", "--check", "root").status == 0
    assert_store_is_whole(rekindle)
    nothing_left()


def assert_store_is_whole(rekindle: Rekindle) -> None:
    """Every blob has the bytes of its name, is needed, and the image's own are all there."""
    layout = Layout(rekindle.home / "store")
    image = images.load(layout, layout.resolve("horse:latest"))
    for layer in image.layers:
        with layout.open_blob(layer) as blob:
            assert Digest.of_bytes(blob.read()) == layer.digest
    names = {path.name for path in (layout.root / "blobs" / "sha256").iterdir()}
    signed = [image.index.digest, *([image.cache.digest] if image.cache else [])]
    signatures = [each for digest in signed for each in layout.referrers(digest)]
    assert len(signatures) == len(signed) + 1, "and the attestation"
    roots = [*layout.tags().values(), *signatures]
    assert names == {digest.hex for digest in layout.reachable(roots)}


@pytest.mark.parametrize("option", ["--oracle-request", "--warm-requests"])
def test_a_request_that_needs_a_variable_fails_before_the_server_starts(
    rekindle: Rekindle, port: int, tmp_path: Path, option: str
) -> None:
    request, started = tmp_path / "request", tmp_path / "started"
    request.write_text('{"path": "/health", "headers": {"X-Tenant": "$NO_SUCH_VARIABLE"}}')
    flags = ["--ready-url", f"http://127.0.0.1:{port}/health", option, str(request)]
    done = rekindle("snapshot", "image", *flags, "--", "sh", "-c", f"touch {started}; exec sleep 60")
    assert (done.status, started.exists()) == (2, False), done.stderr
    assert "NO_SUCH_VARIABLE" in done.stderr
