# SPDX-License-Identifier: Apache-2.0
"""The engines that put vLLM's server to sleep before the snapshot and wake it after the restore.

An engine that sleeps holds no KV cache on its GPU. It keeps its weights in host memory (level 1: they become
part of the image) or drops them (level 2: they are read again from the model's files).

    Sleeping    uses sleep mode's development endpoints, which rekindle/engine/vllm_gate.py closes to other
                clients; both levels
    AtBoundary  uses `vllm.snapshot.server` (since 0.31), which rehearses by itself, sleeps at level 2 and
                opens its port only when it is released; it logs nothing after that
"""

import contextlib
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from rekindle.command_line import with_words
from rekindle.engine import Endpoint, Phase, Request, no_phase
from rekindle.engine.vllm import VllmEngine, completion, served_name, serving_words
from rekindle.engine.vllm_gate import HEADER, KEY_BYTES, KEY_NAME
from rekindle.errors import NotReadyError, OracleError, UsageError, WorkloadError
from rekindle.fields import JSON

if TYPE_CHECKING:
    from rekindle.engine.client import Client, Response
    from rekindle.engine.vllm_command import ServerCommand

_TIMEOUT_SECONDS = 600.0
_POLL_SECONDS = 0.02
_DIRECTORY = Path("/dev/shm/tmp/rekindle")  # noqa: S108 - in the cell's private file system
_READY, _RELEASE = _DIRECTORY / "ready.json", _DIRECTORY / "release.json"
_FOREVER_SECONDS = 1e9
_CANARY = "The capital of France is"  # vllm/snapshot/server.py asks it for one token


def require_sleepable(command: "ServerCommand") -> None:
    """Raise UsageError for a server that cannot be put to sleep as a whole, or not be dumped asleep.

    Each API server answers a part of the requests, so that one of them hears of the sleep. Processes on
    several GPUs keep NCCL's connections while they sleep.
    """
    refused = [
        f"{name} {number}"
        for name, short in (
            ("--api-server-count", "-asc"),
            ("--data-parallel-size", "-dp"),
            ("--tensor-parallel-size", "-tp"),
            ("--pipeline-parallel-size", "-pp"),
        )
        if (number := command.count(name, short)) > 1
    ]
    if refused:
        raise UsageError(
            f"a server with {' and '.join(refused)} cannot be put to sleep for a snapshot",
            hint="use `--weights as-is`, or one process for each GPU",
        )


class Sleeping(VllmEngine):
    """Sleeps by way of the development endpoints."""

    def __init__(self, *, endpoint: Endpoint, level: int, api_keys: Sequence[str] | None = None) -> None:
        super().__init__(endpoint=endpoint, api_keys=api_keys)
        self._level = level
        self._root = Path("/")

    def options(self) -> dict[str, JSON]:
        return {**super().options(), "asleep": self._level}

    def launch(self, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        words = with_words(argv, ["--enable-sleep-mode", "--middleware", "rekindle_gate.Gate"])
        path = environment.get("PYTHONPATH")
        added = {
            "VLLM_SERVER_DEV_MODE": "1",
            "PYTHONPATH": f"{_DIRECTORY}:{path}" if path else str(_DIRECTORY),
        }
        return words, {**environment, **added}

    def enter(self, root: Path) -> None:
        self._root = root
        shutil.copyfile(Path(__file__).with_name("vllm_gate.py"), _make_directory(root) / "rekindle_gate.py")

    def quiesce(self, client: "Client", expected: JSON, request: Request) -> None:
        with self._key() as key:
            self._sleep(client, key)
            self._wake_up(client, key, no_phase)
            got = self.answer(_ask(client, request))
            if not self.agree(expected, got):
                raise OracleError(
                    "the server answers differently after a sleep, so a restored one would, too",
                    cause=f"expected {json.dumps(expected)[:300]}, got {json.dumps(got)[:300]}",
                )
            self._sleep(client, key)

    def wake(self, client: "Client", phase: Phase) -> None:
        with self._key() as key:
            self._wake_up(client, key, phase)

    @contextlib.contextmanager
    def _key(self) -> Iterator[str]:
        """Return the key that opens the gate; it is valid within the context."""
        path = _make_directory(self._root) / KEY_NAME
        key = secrets.token_hex(KEY_BYTES // 2)
        path.write_text(key)
        try:
            yield key
        finally:
            path.unlink()

    def _sleep(self, client: "Client", key: str) -> None:
        self._post(client, key, f"/sleep?level={self._level}")

    def _wake_up(self, client: "Client", key: str, phase: Phase) -> None:
        if self._level == 1:
            with phase("wake"):
                self._post(client, key, "/wake_up")
            return
        with phase("wake"):
            self._post(client, key, "/wake_up?tags=weights")
        with phase("reload weights"):
            self._post(client, key, "/collective_rpc", {"method": "reload_weights"})
        with phase("wake kv cache"):
            self._post(client, key, "/wake_up?tags=kv_cache")

    def _post(self, client: "Client", key: str, path: str, body: JSON = None) -> None:
        request = Request(method="POST", path=path, headers={HEADER: key}, body=body)
        response = _ask(client, self.authorize(request, os.environ))
        if response.status != 200:
            raise WorkloadError(
                f"vLLM answered {path} with status {response.status}",
                cause=response.body[:500].decode(errors="replace"),
                hint="use `--weights as-is` if this vLLM has no sleep mode on this node",
            )


class AtBoundary(VllmEngine):
    """Sleeps by way of vLLM's own snapshot server."""

    def __init__(self, *, endpoint: Endpoint, api_keys: Sequence[str] | None = None, model: str = "") -> None:
        super().__init__(endpoint=endpoint, api_keys=api_keys)
        self._named = model
        # None for a server that does not sleep, as on a lower rung.
        self._root: Path | None = None

    def options(self) -> dict[str, JSON]:
        return {**super().options(), "asleep": "boundary"}

    def launch(self, argv: Sequence[str], environment: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
        python, command = serving_words(argv, environment)
        self._named = served_name(command)
        files = ["--ready-file", str(_READY), "--release-file", str(_RELEASE)]
        timeout = ["--release-timeout-s", f"{_FOREVER_SECONDS:.0f}"]
        words = [*python, "-m", "vllm.snapshot.server", *files, *timeout, "--", *command.given]
        return words, dict(command.unwrapped.environment)

    def enter(self, root: Path) -> None:
        self._root = root
        _make_directory(root)

    def ready(self, client: "Client", timeout: float) -> bool:
        if self._root is None or _below(self._root, _RELEASE).exists():
            return super().ready(client, timeout)
        return _below(self._root, _READY).exists()

    def warm_requests(self, client: "Client") -> Sequence[Sequence[Request]]:  # noqa: ARG002
        return []  # its port is closed; it captures graphs and asks itself a question before it sleeps

    def known_oracle(self) -> tuple[Request, JSON]:
        """Return the question that the server asked itself, as a request, and its answer.

        The answer names the token by its number, since its text may differ between the list of tokens and
        the answer.
        """
        try:
            assert self._root is not None
            ready = json.loads(_below(self._root, _READY).read_bytes())
            (token,) = ready["token_ids"]
            logprob = float(ready["sampled_token_logprob"])
            if not isinstance(token, int) or not math.isfinite(logprob):
                raise ValueError(str(ready)[:300])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OracleError("cannot read the answer of vLLM's snapshot server", cause=repr(error)) from None
        asked = completion(self._named, _CANARY, 1)
        # min_tokens as in vllm/snapshot/server.py: no token that ends the answer.
        body = {**asked.body, "min_tokens": 1, "return_tokens_as_token_ids": True}
        answer = {"tokens": [f"token_id:{token}"], "logprobs": [round(logprob, 6)]}
        return structs.replace(asked, body=body), answer

    def wake(self, client: "Client", phase: Phase) -> None:
        assert self._root is not None
        with phase("wake"):
            marker = {"release": True, "host": self.endpoint.host, "port": self.endpoint.port}
            staged = _below(self._root, _RELEASE.with_suffix(".new"))
            staged.write_text(json.dumps(marker))
            staged.replace(_below(self._root, _RELEASE))
            deadline = time.monotonic() + _TIMEOUT_SECONDS
            while True:
                with contextlib.suppress(OSError, NotReadyError):
                    if super().ready(client, _TIMEOUT_SECONDS):
                        return
                if time.monotonic() > deadline:
                    raise NotReadyError(
                        f"the released server did not open its port within {_TIMEOUT_SECONDS:.0f} s"
                    )
                time.sleep(_POLL_SECONDS)


def _ask(client: "Client", request: Request) -> "Response":
    try:
        return client.ask(request, timeout=_TIMEOUT_SECONDS)
    except OSError as error:
        raise WorkloadError(f"the server did not answer {request.path}", cause=str(error)) from error


def _make_directory(root: Path) -> Path:
    directory = _below(root, _DIRECTORY)
    directory.mkdir(mode=0o755, exist_ok=True)
    return directory


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")
