# SPDX-License-Identifier: Apache-2.0
"""nginx before a registry, with its limit for the size of a request: 1 MiB, unless it is told another."""

import contextlib
import socket
import subprocess
import time
from pathlib import Path
from typing import Self

_CONFIG = """daemon off;
user root;
pid {place}/pid;
worker_processes 1;
error_log {place}/log warn;
events {{}}
http {{
  access_log off;
  client_max_body_size 1m;
  client_body_temp_path {place}/bodies;
  proxy_temp_path {place}/answers;
  fastcgi_temp_path {place}/unused;
  uwsgi_temp_path {place}/unused;
  scgi_temp_path {place}/unused;
  server {{
    listen {host};
    location / {{
      proxy_pass http://{registry};
      proxy_set_header Host $http_host;
    }}
  }}
}}
"""


class FrontEnd:
    """A running nginx at `host`, through which `registry` is reached."""

    def __init__(self, program: Path, place: Path, registry: str) -> None:
        place.mkdir(parents=True)
        self._log = place / "log"
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self.host = f"127.0.0.1:{sock.getsockname()[1]}"
        config = place / "nginx.conf"
        config.write_text(_CONFIG.format(place=place, host=self.host, registry=registry))
        self._process = subprocess.Popen(
            [str(program), "-p", str(place), "-e", str(self._log), "-c", str(config)],
            stdin=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 20
        while True:
            assert self._process.poll() is None, self._log.read_text()
            address, _, port = self.host.partition(":")
            with contextlib.suppress(OSError), socket.create_connection((address, int(port)), 5):
                return
            assert time.monotonic() < deadline, f"no answer: {self._log.read_text()}"
            time.sleep(0.02)

    def close(self) -> None:
        self._process.terminate()  # its workers end with it
        self._process.wait(20)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
