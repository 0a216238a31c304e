# SPDX-License-Identifier: Apache-2.0
"""What is on the disk today is what a server does today: a restored one has not loaded anything else.

A Python server is snapshotted, then the disk changes as deployments change it, and then comes the restore. It
must not take the process, and must say why; the cold start that it takes in its place answers by what is on
the disk now.
"""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Done, Rekindle, free_port, listening, wait_for

pytestmark = pytest.mark.criu
LOWER = 3

SERVER = """
import http.server, importlib.metadata, json, mmap, os, pathlib, sys
import company.words          # of a distribution
import local_module           # beside the script
from company import data

def read(name):
    value = options[name]
    place = pathlib.Path(value)
    if place.is_dir():
        return [p.read_text() for p in sorted(place.iterdir()) if p.suffix == ".json"]
    return place.read_text()

options = dict(word.partition("=")[::2] for word in sys.argv[2:])
model = pathlib.Path(options["--model"])
with open(model / "model.safetensors", "rb") as file:
    file.seek(-8, 2)
    weights = file.read().hex()
hub = pathlib.Path(os.environ["HF_HOME"], "hub/models--org--tiny")
revision = (hub / "refs/main").read_text()
config = (hub / "snapshots" / revision / "config.json").read_text()
disk = pathlib.Path(os.environ["HF_HOME"]).parent
mapped = []
for name in ("small.bin", "large.bin"):
    with open(disk / name, "rb") as file:
        mapped.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
loads = {
    "small": mapped[0][:5].decode(), "large": mapped[1][:5].decode(),
    "words": company.words.GREETING, "version": importlib.metadata.version("company"),
    "local": local_module.VALUE, "data": data(), "weights": weights, "config": config,
    "template": read("--chat-template"), "adapters": read("--adapters"),
    "settings": pathlib.Path(os.environ["APP_SETTINGS"]).read_text(),
    "unnamed": pathlib.Path(sys.argv[0]).with_name("unnamed.txt").read_text(),
}
pathlib.Path(sys.argv[0]).with_name("own.log").write_text("started")
pathlib.Path(sys.argv[0]).with_name("own.log").read_text()

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps(loads).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *words): pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def safetensors(*tensors: bytes) -> bytes:
    header, at = {}, 0
    for number, content in enumerate(tensors):
        header[f"layer.{number}"] = {
            "dtype": "U8",
            "shape": [len(content)],
            "data_offsets": [at, at + len(content)],
        }
        at += len(content)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(tensors)


def write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@dataclass(slots=True, kw_only=True)
class Deployed:
    """A server's disk, its snapshot `app` in a home of its own, and the command that was snapshotted."""

    root: Path
    rekindle: Rekindle
    port: int

    @property
    def disk(self) -> Path:
        return self.root / "disk"

    @property
    def site(self) -> Path:
        return next((self.disk / "venv/lib").glob("python3*/site-packages"))

    @property
    def command(self) -> list[str]:
        disk = self.disk
        return [
            *(f"{disk}/venv/bin/python", f"{disk}/app/current/server.py", str(self.port)),
            *(f"--model={disk}/models/live", f"--chat-template={disk}/chat.jinja"),
            f"--adapters={disk}/adapters",
        ]

    def match(self) -> list[tuple[str, bool]]:
        """The code of each difference, and whether it is hard."""
        done = self.rekindle("match", "app", "--json", "--", *self.command)
        steps = done.json["steps"]
        return [(each["code"], each["hard"]) for each in steps[0]["reasons"]]

    def restored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The report of a restore, and what the server that it brings up has loaded."""
        report, log = self.root / "report.json", self.root / "restore.log"
        report.unlink(missing_ok=True)
        process = self.rekindle.spawn("restore", "app", "--report", str(report), "--", *self.command, log=log)
        try:
            wait_for(lambda: report.exists() or process.poll() is not None, 60)
            assert process.poll() is None, log.read_text()
            wait_for(lambda: listening(self.port), 10)
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=10) as response:
                return json.loads(report.read_text()), json.loads(response.read())
        finally:
            process.terminate()
            process.wait(30)


def lay_out(disk: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(disk / "venv")], check=True)
    site = next((disk / "venv/lib").glob("python3*/site-packages"))
    write(
        site / "company/__init__.py",
        "import pathlib\n\n\ndef data():\n    return pathlib.Path("
        "__file__).with_name('data.json').read_text()\n",
    )
    write(site / "company/words.py", "GREETING = 'hello'\n")
    write(site / "company/data.json", "{}")
    write(site / "company-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: company\nVersion: 1.0\n")
    write(site / "company-1.0.dist-info/RECORD", "company/__init__.py,,\ncompany/words.py,,\n")
    write(site / "bystander-1.0.dist-info/METADATA", "Name: bystander\nVersion: 1.0\n")
    write(disk / "app/release-1/server.py", SERVER)
    write(disk / "app/release-1/local_module.py", "VALUE = 1\n")
    write(disk / "app/release-1/unnamed.txt", "1")
    (disk / "app/current").symlink_to("release-1")
    write(disk / "models/one/model.safetensors", safetensors(*[bytes([n]) * (1 << 20) for n in range(4)]))
    write(disk / "models/one/config.json", "{}")
    (disk / "models/live").symlink_to("one")
    write(disk / "chat.jinja", "{{ messages }}")
    write(disk / "adapters/a.json", '{"a": 1}')
    write(disk / "small.bin", b"small" + bytes(10_000))
    write(disk / "large.bin", b"large")
    os.truncate(disk / "large.bin", (256 << 20) + 1)
    write(disk / "settings.json", '{"s": 1}')
    hub = disk / "hf/hub/models--org--tiny"
    write(hub / "refs/main", "c" * 40)
    for commit, blob, content in (("c", "1", '{"v": 1}'), ("d", "2", '{"v": 2}')):
        write(hub / "blobs" / (blob * 40), content)
        (hub / "snapshots" / (commit * 40)).mkdir(parents=True)
        (hub / "snapshots" / (commit * 40) / "config.json").symlink_to(f"../../blobs/{blob * 40}")


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    root = tmp_path_factory.mktemp("deployed")
    lay_out(root / "disk")
    environment = {
        "TMPDIR": str(root),
        "HF_HOME": str(root / "disk/hf"),
        "APP_SETTINGS": str(root / "disk/settings.json"),
    }
    made = Deployed(root=root, rekindle=Rekindle(root / "home", environment), port=free_port())
    write(
        root / "oracle.json",
        '{"method": "POST", "path": "/", "headers": {}, "body": {}, "select": ["/local"]}',
    )
    done: Done = made.rekindle(
        *("snapshot", "app", "--ready-url", f"http://127.0.0.1:{made.port}/"),
        *("--oracle-request", str(root / "oracle.json"), "--", *made.command),
    )
    assert done.status == 0, done.stderr
    assert "WARNING" not in done.stderr
    subprocess.run(["cp", "-a", str(root / "disk"), str(root / "as-it-was")], check=True)
    return made


@pytest.fixture
def deployed(_saved: Deployed) -> Iterator[Deployed]:
    """The snapshot, and the disk as it was; what a test changes there is undone by copying all of it anew."""
    yield _saved
    shutil.rmtree(_saved.disk)
    subprocess.run(["cp", "-a", str(_saved.root / "as-it-was"), str(_saved.disk)], check=True)


def test_a_disk_that_has_not_changed_changes_nothing(deployed: Deployed) -> None:
    report, loads = deployed.restored()
    assert report["outcome"] == "restored", report
    assert report["reasons"] == []
    assert loads["words"] == "hello"


def test_times_and_inodes_tell_nothing(deployed: Deployed) -> None:
    """Another node has unpacked the same image, and all its times are others."""
    for path in deployed.disk.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (1, 1))
    assert deployed.match() == []


def in_place(path: Path, old: str, new: str) -> None:
    """Change a file but not its size, its time or its inode."""
    status = path.stat()
    assert len(old) == len(new)
    with open(path, "r+b") as file:
        at = file.read(1 << 20).index(old.encode())
        file.seek(at)
        file.write(new.encode())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def upgrade(deployed: Deployed) -> None:
    (deployed.site / "company-1.0.dist-info").rename(deployed.site / "company-1.1.dist-info")
    metadata = deployed.site / "company-1.1.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))


def retrain(deployed: Deployed) -> None:
    """One tensor of four is another; sizes and times are the same."""
    path = deployed.disk / "models/one/model.safetensors"
    status = path.stat()
    path.write_bytes(safetensors(*[bytes([n]) * (1 << 20) for n in (0, 1, 2, 9)]))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def promote(deployed: Deployed) -> None:
    """A link names another model of the same size, which is not new."""
    write(deployed.disk / "models/two/config.json", "{}")
    write(
        deployed.disk / "models/two/model.safetensors",
        safetensors(*[bytes([n]) * (1 << 20) for n in (5, 6, 7, 8)]),
    )
    (deployed.disk / "models/live").unlink()
    (deployed.disk / "models/live").symlink_to("two")


def release(deployed: Deployed) -> None:
    app = deployed.disk / "app"
    shutil.copytree(app / "release-1", app / "release-2")
    in_place(app / "release-2/local_module.py", "1", "2")
    (app / "current").unlink()
    (app / "current").symlink_to("release-2")


def shadow(deployed: Deployed) -> None:
    write(deployed.disk / "app/release-1/company/words.py", "GREETING = 'shadow'\n")
    write(deployed.disk / "app/release-1/company/__init__.py", "def data():\n    return ''\n")


def plugin(deployed: Deployed) -> None:
    write(deployed.site / "surprise-1.0.dist-info/METADATA", "Name: surprise\nVersion: 1.0\n")
    write(deployed.site / "surprise-1.0.dist-info/entry_points.txt", "[vllm.general_plugins]\na = b:c\n")


HARD: dict[str, tuple[Callable[[Deployed], object], str, str, object]] = {
    "another version of a package": (upgrade, "package", "version", "1.1"),
    "a module patched in place": (
        lambda d: in_place(d.site / "company/words.py", "hello", "jello"),
        *("code-file", "words", "jello"),
    ),
    "a file within a package": (
        lambda d: write(d.site / "company/data.json", "[]"),
        *("code-file", "data", "[]"),
    ),
    "the module beside the script": (
        lambda d: in_place(d.disk / "app/release-1/local_module.py", "1", "2"),
        *("code-file", "local", 2),
    ),
    "another release behind a link": (release, "code-file", "local", 2),
    "a retrained model of the same size and time": (retrain, "named-file", "weights", "09" * 8),
    "another model behind a link": (promote, "named-file", "weights", "08" * 8),
    "another revision of the hub": (
        lambda d: write(d.disk / "hf/hub/models--org--tiny/refs/main", "d" * 40),
        *("model-changed", "config", '{"v": 2}'),
    ),
    "another chat template of the same size and time": (
        lambda d: in_place(d.disk / "chat.jinja", "messages", "messagez"),
        *("named-file", "template", "{{ messagez }}"),
    ),
    "another file in a directory that is named": (
        lambda d: write(d.disk / "adapters/a.json", '{"a": 2}'),
        *("named-file", "adapters", ['{"a": 2}']),
    ),
    "a file that a variable names": (
        lambda d: in_place(d.disk / "settings.json", "1", "2"),
        *("named-file", "settings", '{"s": 2}'),
    ),
    "a mapped file of the same size and time": (
        lambda d: in_place(d.disk / "small.bin", "small", "other"),
        *("rootfs-file", "small", "other"),
    ),
    "a mapped file above 256 MiB": (
        lambda d: in_place(d.disk / "large.bin", "large", "other"),
        *("rootfs-file", "large", "other"),
    ),
    "a module of the same name that is found first": (shadow, "package", "words", "shadow"),
    "a module that Python runs at its start": (
        lambda d: write(
            d.site / "sitecustomize.py", "import company.words\ncompany.words.GREETING = 'customized'\n"
        ),
        *("package", "words", "customized"),
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_the_process_is_not_taken_after(deployed: Deployed, name: str) -> None:
    change, code, loaded, now = HARD[name]
    change(deployed)
    found = deployed.match()
    assert (code, True) in found, found
    report, loads = deployed.restored()
    assert loads[loaded] == now, "what a start would load"
    assert report["outcome"] == "cold"
    assert [(each["code"], each["hard"]) for each in report["reasons"] if each["rung"] == "process"] == found


def test_a_new_package_that_others_load(deployed: Deployed) -> None:
    plugin(deployed)
    assert deployed.match() == [("package", True)]


def test_packages_beside_those_in_use_are_told(deployed: Deployed) -> None:
    (deployed.site / "bystander-1.0.dist-info").rename(deployed.site / "bystander-2.0.dist-info")
    write(deployed.site / "tool-1.0.dist-info/entry_points.txt", "[console_scripts]\na = b:c\n")
    assert deployed.match() == [("package-other", False)] * 2


def test_a_file_that_nothing_names_is_told(deployed: Deployed) -> None:
    write(deployed.disk / "app/release-1/unnamed.txt", "2")
    write(deployed.disk / "app/release-1/own.log", "the server writes this itself")
    assert deployed.match() == [("read-file", False)]


def test_a_policy_softens_and_hardens(deployed: Deployed) -> None:
    write(deployed.disk / "app/release-1/unnamed.txt", "2")
    write(deployed.disk / "chat.jinja", "another")
    policy = deployed.rekindle.home / "policy.toml"
    policy.write_text('[match]\nsoft = ["named-file"]\nhard = ["read-file"]\n')
    try:
        assert sorted(deployed.match()) == [("named-file", False), ("read-file", True)]
    finally:
        policy.unlink()


def test_a_change_after_a_restore_is_seen(deployed: Deployed) -> None:
    """What an earlier comparison found is remembered, until a file changes."""
    time.sleep(2.1)  # for times that prove something
    assert deployed.match() == []
    remembered = list((deployed.rekindle.home / "compared").iterdir())
    assert deployed.match() == []
    assert list((deployed.rekindle.home / "compared").iterdir()) == remembered != []
    in_place(deployed.site / "company/words.py", "hello", "jello")
    assert deployed.match() == [("code-file", True)]


def test_a_module_that_is_changed_while_the_server_starts_fails_the_snapshot(
    rekindle: Rekindle, tmp_path: Path, port: int
) -> None:
    write(tmp_path / "late.py", "")
    write(
        tmp_path / "server.py",
        "import late, pathlib, sys, time, http.server\n"
        "place = pathlib.Path(sys.argv[0]).parent\n"
        "(place / 'loaded').touch()\n"
        "while not (place / 'patched').exists(): time.sleep(0.01)\n"
        "class Handler(http.server.SimpleHTTPRequestHandler):\n"
        "    def do_POST(self): self.send_response(200); self.end_headers()\n"
        "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n",
    )
    write(tmp_path / "oracle.json", '{"method": "POST", "path": "/", "headers": {}, "body": {}}')
    snapshot = rekindle.spawn(
        *("snapshot", "app", "--no-prove", "--ready-url", f"http://127.0.0.1:{port}/"),
        *("--oracle-request", str(tmp_path / "oracle.json"), "--"),
        *(sys.executable, str(tmp_path / "server.py"), str(port)),
        log=tmp_path / "log",
    )
    wait_for((tmp_path / "loaded").exists, 20)
    write(tmp_path / "late.py", "patched = True\n")
    write(tmp_path / "patched", "")
    assert snapshot.wait(60) == 30
    assert "late.py was changed while the server was running" in (tmp_path / "log").read_text()
