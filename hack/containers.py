# SPDX-License-Identifier: Apache-2.0
"""Try rekindle in containers by podman and crun, and write into docs/operations.md what works.

The containers have this machine's file system as their image, so that the checkout and CRIU are in them.
"""

import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hack.docs.pages import DOCS, table
from rekindle.run import Completed, run
from restore.flow import LOWER_STATUS

ROOT = Path(__file__).parents[1]
PAGE = DOCS / "operations.md"
BEGIN, END = "<!-- containers: written by hack/containers -->\n", "<!-- /containers -->\n"
SERVER = [sys.executable, str(ROOT / "tests/servers/mule.py"), "drains=0"]
ORACLE = ROOT / "tests/servers/oracle.json"
PORT = 28473  # one that others are unlikely to have, for --network=host
_SECONDS = 60.0

# crun refuses version 2 of control groups beside version 1. The root is bound, since crun must pivot into it.
_BEFORE = """
if mountpoint --quiet /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
mkdir -p "$1" && mount --bind / "$1" && shift && exec "$@"
"""
_CONFIGURATION = '[containers]\ndefault_ulimits = []\n[engine]\nevents_logger = "none"\n'
# podman raises these for root, which needs CAP_SYS_RESOURCE.
_LIMITS = ["--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096"]


class Podman:
    """podman with a storage of its own. `place` is seen by the containers, under the same path."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._storage = Path(tempfile.mkdtemp(prefix="podman."))
        self._root = self._storage / "file-system"
        (self._storage / "containers.conf").write_text(_CONFIGURATION)
        self._names = (f"rekindle-{os.getpid()}-{number}" for number in itertools.count())

    def __call__(self, *words: str) -> Completed:
        """Run a podman command."""
        prefix = ["unshare", "--mount", "--propagation=private", "sh", "-euc", _BEFORE, "sh", str(self._root)]
        places = {"--root": "storage", "--runroot": "run", "--tmpdir": "tmp"}
        options = [f"{option}={self._storage / name}" for option, name in places.items()]
        options += ["--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--runtime=crun"]
        environment = {**os.environ, "CONTAINERS_CONF": str(self._storage / "containers.conf")}
        command = [*prefix, "podman", *options, *words]
        return run(command, timeout=120, env=environment, cwd=self._storage)  # where conmon leaves files

    def start(self, flags: Sequence[str], command: Sequence[str], environment: dict[str, str]) -> str:
        """Start a container and return its name."""
        name = next(self._names)
        seen = {self.place, ROOT, Path.home() / ".cache", Path(sys.prefix), Path(sys.base_prefix)}
        network = [] if any(flag.startswith("--network") for flag in flags) else ["--network=none"]
        words = ["run", "--detach", f"--name={name}", *network, *_LIMITS, *flags]
        words += [f"--volume={path}:{path}" for path in sorted(seen)]
        words += [f"--env={key}={value}" for key, value in environment.items()]
        done = self(*words, f"--workdir={ROOT}", "--rootfs", str(self._root), *command)
        if done.status:
            raise RuntimeError(f"podman exited with {done.status}: {done.output}")
        return name

    def status(self, name: str) -> int:
        """Wait for a container's end; return its exit status."""
        return int(self("wait", "--interval=100ms", name).output.split()[-1])

    def log(self, name: str) -> str:
        return self("logs", name).output

    def state(self, name: str) -> dict[str, Any]:
        text = self("inspect", "--format={{json .State}}", name).output
        return dict(json.loads(text[text.index("{") :]))

    def close(self) -> None:
        self("rm", "--all", "--force", "--time=0")
        shutil.rmtree(self._storage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A kind of container: how the table names it, podman's flags, and the user that these choose."""

    name: str
    flags: Sequence[str]
    user: int = 0


_CAPABILITIES = [f"--cap-add={name}" for name in ("SYS_ADMIN", "NET_ADMIN", "SYS_TIME")]
# Without a copy of what is in this machine's /tmp.
_READ_ONLY = ["--read-only", "--read-only-tmpfs=false", "--tmpfs=/tmp:notmpcopyup"]
_WITH = "`--cap-add=SYS_ADMIN,NET_ADMIN,SYS_TIME`"
UNFILTERED = Container(
    name="... and `--security-opt=seccomp=unconfined`",
    flags=[*_CAPABILITIES, "--security-opt=seccomp=unconfined"],
)
PRIVILEGED = Container(name="`--privileged`", flags=["--privileged"])
CONTAINERS = [
    PRIVILEGED,
    Container(name="`--privileged --read-only`", flags=["--privileged", *_READ_ONLY]),
    Container(name="`--privileged --network=host`", flags=["--privileged", "--network=host"]),
    Container(name=_WITH, flags=_CAPABILITIES),
    Container(name="... and `--read-only`", flags=[*_CAPABILITIES, *_READ_ONLY]),
    UNFILTERED,
    Container(name="no flags", flags=[]),
    # DAC_READ_SEARCH: it may read root's files, such as this checkout.
    Container(name="`--user=1000`", flags=["--user=1000", "--cap-add=DAC_READ_SEARCH"], user=1000),
]
# Snapshots that are restored in all of them, by their tags.
SNAPSHOTS = {
    "privileged": "one of a privileged container",
    "few": "one with three capabilities and no seccomp",
}


@dataclass(slots=True)
class ContainerTrial:
    """Runs rekindle in containers, with images in `podman.place` that are signed by a key there."""

    podman: Podman
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        prefix = self.podman.place / "key"
        environment = {**os.environ, "COSIGN_PASSWORD": ""}
        words = ["generate-key-pair", "--output-key-prefix", str(prefix)]
        run([sys.executable, "-m", "rekindle", *words], timeout=60, env=environment, cwd=ROOT)

    def start(self, container: Container, *words: str) -> str:
        """Start a command of rekindle with a home of its own."""
        home = self.podman.place / f"home-{next(self._numbers)}"
        home.mkdir()
        os.chown(home, container.user, -1)
        environment = {"REKINDLE_HOME": str(home), "COSIGN_PASSWORD": "", "PATH": os.environ["PATH"]}
        return self.podman.start(container.flags, [sys.executable, "-m", "rekindle", *words], environment)

    def snapshot(self, container: Container, tag: str, server: Sequence[str] = SERVER) -> int:
        """Take a snapshot in a container, and return the exit status."""
        name = self.start(
            container,
            *("snapshot", f"oci:{self.podman.place}/images:{tag}", "--no-prove"),
            *("--sign-key", f"{self.podman.place}/key.key", "--oracle-request", str(ORACLE)),
            *("--ready-url", f"http://127.0.0.1:{PORT}/health", "--", *server, str(PORT)),
        )
        status = self.podman.status(name)
        if status:
            print(self.podman.log(name), file=sys.stderr)
        return status

    def restore(self, container: Container, tag: str, *flags: str) -> tuple[str, dict[str, Any]]:
        """Restore an image; return the container's name and the report, once the server is ready."""
        report = self.podman.place / f"report-{next(self._numbers)}" / "report.json"
        report.parent.mkdir()
        report.parent.chmod(0o777)
        image, key = f"oci:{self.podman.place}/images:{tag}", f"{self.podman.place}/key.pub"
        words = ["restore", image, "--verify-key", key, "--report", str(report), *flags]
        name = self.start(container, *words)
        deadline = time.monotonic() + _SECONDS
        while not report.exists() and self.podman.state(name)["Running"] and time.monotonic() < deadline:
            time.sleep(0.1)
        if not report.exists():
            raise RuntimeError(self.podman.log(name))
        return name, json.loads(report.read_text())

    def stop(self, name: str) -> int:
        """Stop a container as podman does, and return its exit status."""
        self.podman("stop", "--time=20", name)
        return self.podman.status(name)

    def rung(self, container: Container, tag: str) -> str:
        """Restore an image and stop it; return the rung, with the codes against the process."""
        name, report = self.restore(container, tag)
        if (status := self.stop(name)) not in {0, LOWER_STATUS}:
            raise RuntimeError(f"{container.name}: exited with {status}\n{self.podman.log(name)}")
        against = {each["code"] for each in report["reasons"] if each["rung"] == "process" and each["hard"]}
        codes = ", ".join(f"`{code}`" for code in sorted(against))
        return "process" if report["outcome"] == "restored" else f"{report['outcome']} ({codes})"


@contextlib.contextmanager
def trial() -> Iterator[ContainerTrial]:
    """Yield a ContainerTrial in a new directory, and remove all that it made."""
    with tempfile.TemporaryDirectory(prefix="containers.") as directory:
        Path(directory).chmod(0o755)
        podman = Podman(Path(directory))
        try:
            yield ContainerTrial(podman)
        finally:
            podman.close()


def row(tried: ContainerTrial, number: int, container: Container) -> list[str]:
    """Try a container and return its row of the table."""
    status = tried.snapshot(container, f"own-{number}")
    own = f"no snapshot ({status})" if status else tried.rung(container, f"own-{number}")
    others = [tried.rung(container, tag) for tag in SNAPSHOTS]
    cells = [container.name, own, *others]
    print(*cells, sep=" | ", file=sys.stderr)
    return cells


def main() -> int:
    head = ["`podman run`", *(f"restores {what} by" for what in ("its own snapshot", *SNAPSHOTS.values()))]
    with trial() as tried:
        for container, tag in zip((PRIVILEGED, UNFILTERED), SNAPSHOTS, strict=True):
            if status := tried.snapshot(container, tag):
                raise RuntimeError(f"no snapshot in a container with {container.name}: status {status}")
        text = table(head, (row(tried, *each) for each in enumerate(CONTAINERS)))
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = before + BEGIN + text + END + after
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(new)
        return 0
    if new != page:
        print(f"docs/{PAGE.name} is not up to date: run hack/containers. Now:\n{text}", file=sys.stderr)
    return int(new != page)


if __name__ == "__main__":
    sys.exit(main())
