# SPDX-License-Identifier: Apache-2.0
"""What tests of the ladder share: an image to restore, a restore that runs, and a look at what is left.

The image is of a workhorse with a kernel cache. Its command is `paddock.py`, so that a lower rung starts what
a test has put there: a mule, unless it says otherwise.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oci import image as images
from oci import media_types
from oci.layout import Layout
from tests.conftest import SERVERS, KeyPair, Rekindle, free_port, listening, wait_for, workhorse_flags
from tests.samples.cache import write
from tests.traces import adopting_orphans, children

MULE = [sys.executable, str(SERVERS / "mule.py")]
FAULTY = [sys.executable, str(SERVERS / "faulty.py")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A snapshot of a workhorse in a layout, signed, with a kernel cache that fits every node."""

    place: Path
    image: str
    port: int
    key: KeyPair
    command: Sequence[str]
    kernels: Path

    @property
    def layout(self) -> Layout:
        return Layout(self.place / "images")

    @property
    def layer_bytes(self) -> dict[str, int]:
        """The sizes of the process's layers, by digest."""
        image = images.load(self.layout, self.layout.resolve("1"))
        return {str(layer.digest): layer.size for layer in image.layers}

    @property
    def layers(self) -> dict[str, list[str]]:
        """The digests of the layers, of the process and of the cache."""
        image = images.load(self.layout, self.layout.resolve("1"))
        assert image.cache is not None
        kernels = json.loads(self.layout.read(image.cache, limit_bytes=1 << 20))
        return {
            "process": [str(layer.digest) for layer in image.layers],
            "cache": [layer["digest"] for layer in kernels["layers"]],
        }


def save(place: Path, *, prefix: Sequence[str] = (), server: Sequence[str] = ()) -> Saved:
    """Makes one, by a command with this prefix; of another server than a workhorse, if one is given."""
    port, key = free_port(), KeyPair(place / "key")
    (place / "stable").mkdir()
    if server:
        (place / "stable" / "instead").write_text(json.dumps(server))
    kernels = place / "caches" / "triton"
    write(kernels / "KEY" / "add.json", "{}")  # without a target, since no node of a test has a GPU
    write(kernels / "KEY" / "add.bin", bytes(range(256)) * 100)
    environment = {"TMPDIR": str(place), "COSIGN_PASSWORD": "", "TRITON_CACHE_DIR": str(kernels)}
    rekindle = Rekindle(place / "home", environment)
    assert rekindle("generate-key-pair", "--output-key-prefix", str(key.prefix)).status == 0
    rekindle.prefix = list(prefix)
    command = [sys.executable, str(SERVERS / "paddock.py"), str(place / "stable"), str(port)]
    done = rekindle(
        *("snapshot", f"oci:{place}/images:1", "--no-prove", *workhorse_flags(port), *key.sign),
        *("--", *command),
    )
    assert done.status == 0, done.stderr
    assert rekindle("restore", f"oci:{place}/images:1", "--plan", *key.verify).status == 0  # tries this node
    subprocess.run(["rm", "-r", str(kernels.parent)], check=True)
    return Saved(
        place=place, image=f"oci:{place}/images:1", port=port, key=key, command=command, kernels=kernels
    )


def rewrite_record(saved: Saved, to: Path, **changes: Any) -> str:
    """An image whose record says something else, with every digest right; nobody has signed it.

    Changes are by the path of a field, with __ between its parts; a function gets the old value.
    """
    layout = Layout(to)
    shutil.copytree(saved.place / "images", to)
    old = images.load(layout, layout.resolve("1"))
    document = json.loads(old.record.to_bytes())
    for path, change in changes.items():
        *parents, name = path.split("__")
        where = document
        for parent in parents:
            where = where[parent]
        where[name] = change(where.get(name)) if callable(change) else change
    config = layout.put(json.dumps(document).encode(), media_types.RECORD)
    manifest = json.loads(layout.read(old.process, limit_bytes=1 << 20)) | {"config": config.to_json()}
    content = json.dumps(manifest).encode()
    process = layout.put(content, media_types.MANIFEST, artifact_type=media_types.PROCESS)
    index = json.loads(layout.read(old.index, limit_bytes=1 << 20))
    index["manifests"] = [
        process.to_json() if each["digest"] == old.process.digest else each for each in index["manifests"]
    ]
    root = layout.put(json.dumps(index).encode(), media_types.INDEX, artifact_type=media_types.SNAPSHOT)
    layout.publish(layout, root, "1")
    return f"oci:{to}:1"


@dataclass(slots=True, kw_only=True)
class Running:
    """A `rekindle restore` in the foreground."""

    process: "subprocess.Popen[bytes]"
    log: Path
    path: Path
    port: int

    @property
    def report(self) -> dict[str, Any]:
        """The report, without the reason that `save` causes: it does not prove its image."""
        report = dict(json.loads(self.path.read_text()))
        report["reasons"] = [each for each in report["reasons"] if each["code"] != "not-proved"]
        return report

    @property
    def reasons(self) -> list[tuple[str, str]]:
        return [(reason["rung"], reason["code"]) for reason in self.report["reasons"]]

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until_ready(self, outcome: str, seconds: float = 60) -> None:
        wait_for(lambda: self.path.exists() or self.process.poll() is not None, seconds)
        assert self.process.poll() is None, self.said
        assert self.report["outcome"] == outcome, self.said
        assert listening(self.port), self.said

    def until(self, text: str, seconds: float = 60) -> None:
        wait_for(lambda: text in self.said or self.process.poll() is not None, seconds)
        assert text in self.said, self.said

    def ask(self, path: str, body: object = None, *, port: int = 0) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port or self.port}{path}", data)
        with urllib.request.urlopen(request, timeout=30) as response:
            return str(response.read().decode())

    def end(self) -> int:
        """Lets a mule end with status 0; returns ours."""
        self.ask("/end", {})
        return self.process.wait(30)

    def send(self, signum: int) -> None:
        self.process.send_signal(signum)


@dataclass(slots=True, kw_only=True)
class Scene:
    """A home of its own, in which the image is restored, in the environment of this test."""

    saved: Saved
    rekindle: Rekindle
    directory: Path
    _running: list[Running] = field(default_factory=list)

    def puts(self, *command: str) -> None:
        """What lower rungs start in place of the recorded server; it gets the port as its last word."""
        (self.saved.place / "stable" / "instead").write_text(json.dumps(command))

    def doctored(self, **changes: Any) -> str:
        """An image with another record, signed by the owner of the key."""
        image = rewrite_record(self.saved, self.directory / "doctored", **changes)
        done = self.rekindle("sign", image, *self.saved.key.sign, env={"COSIGN_PASSWORD": ""})
        assert done.status == 0, done.stderr
        return image

    def faults(self, *faults: str) -> None:
        self.rekindle.prefix = [*FAULTY, *faults, "--"]

    def restore(
        self,
        *flags: str,
        image: str | None = None,
        command: Sequence[str] = (),
        port: int = 0,
        **options: Any,
    ) -> Running:
        number = len(self._running)
        report, log = self.directory / f"report-{number}", self.directory / f"log-{number}"
        words = [
            "restore",
            image or self.saved.image,
            *self.saved.key.verify,
            "--report",
            str(report),
            *flags,
        ]
        words += ["--", *command] if command else []
        process = self.rekindle.spawn(*words, log=log, **options)
        running = Running(process=process, log=log, path=report, port=port or self.saved.port)
        self._running.append(running)
        return running

    def ended(self, *flags: str, **options: Any) -> Running:
        """One that is to fail; `process.returncode` is its status."""
        running = self.restore(*flags, **options)
        running.process.wait(60)
        return running

    def nothing_is_left(self, *, kept: bool = False) -> None:
        """Of any restore, once all have ended; with `kept`, the kernel cache is in its place."""
        for running in self._running:
            assert running.process.poll() is not None, "it still runs"
        wait_for(lambda: not children(), 10)
        for port in {running.port for running in self._running} | {self.saved.port}:
            assert not listening(port)
        mounts = Path("/proc/self/mountinfo").read_text()
        for path in (self.directory, self.saved.place):
            assert str(path) not in mounts
            assert not list(path.rglob(".*.rekindle-*"))
        if (self.rekindle.home / "run").exists():
            assert not list((self.rekindle.home / "run").iterdir())
        assert self.saved.kernels.exists() == kept
        assert not list((self.directory / "tmp").iterdir())

    def close(self) -> None:
        for running in self._running:
            if running.process.poll() is None:
                running.process.kill()
                running.process.wait(30)
        (self.saved.place / "stable" / "instead").unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", str(self.saved.kernels.parent)], check=True)


@contextlib.contextmanager
def scene(saved: Saved, directory: Path) -> Iterator[Scene]:
    """Within, orphans come to this process: nobody can hide from `nothing_is_left`."""
    (directory / "tmp").mkdir()
    environment = {"TMPDIR": str(directory / "tmp"), "TRITON_CACHE_DIR": ""}
    made = Scene(saved=saved, rekindle=Rekindle(directory / "home", environment), directory=directory)
    tools = directory / "home" / "tools"
    tools.mkdir(parents=True)
    for known in (saved.place / "home" / "tools").glob("*.json"):  # that CRIU works here was tried already
        (tools / known.name).write_bytes(known.read_bytes())
    made.puts(*MULE)
    with adopting_orphans():
        try:
            yield made
        finally:
            made.close()
            deadline = time.monotonic() + 10
            while left := children():
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                assert time.monotonic() < deadline
                time.sleep(0.02)
