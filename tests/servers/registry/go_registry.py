# SPDX-License-Identifier: Apache-2.0
"""go-containerregistry's registry on loopback, which shares no code with docker-registry.

`crane registry serve` has no referrers API; hack/get-go-registry compiles the same with it. Manifests are in
memory.
"""

import contextlib
import http.client
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self


class GoRegistry:
    """A running registry at `host`; what it says is in `log`."""

    def __init__(self, command: Sequence[str | Path], place: Path) -> None:
        """The address to listen at is the last argument of the command."""
        place.mkdir(parents=True)
        self.log = place / "registry.log"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{sock.getsockname()[1]}"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [*map(str, command), self.host],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.close()
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 20
        while True:
            assert self._process.poll() is None, self.log.read_text()
            connection = http.client.HTTPConnection(self.host, timeout=5)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", "/v2/")
                with connection.getresponse() as response:
                    assert response.status == 200
                return
            assert time.monotonic() < deadline, f"no answer: {self.log.read_text()}"
            time.sleep(0.02)

    def close(self) -> None:
        self._process.kill()
        self._process.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
