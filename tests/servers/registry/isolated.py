# SPDX-License-Identifier: Apache-2.0
"""Runs `rekindle copy` on a machine of its own: an /etc, a loopback and a name service that are ours.

    unshare --mount --net python -m tests.servers.registry.isolated DIRECTORY

The registry is at registry.test, over TLS, and wants a client certificate; the name service fails at first.
Prints as JSON what came of it. To be run as root in fresh namespaces, since it changes them.
"""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from tests.servers.registry.relay import Authority, Tls
from tests.servers.registry.simulator import Registry

NAME = "registry.test"
FAILURES = 4  # glibc asks for both kinds of addresses at once
_SIOCSIFFLAGS, _IFF_UP, _IFF_LOOPBACK = 0x8914, 0x1, 0x8
_SERVFAIL, _TYPE_A = 2, 1


def main(directory: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        request = struct.pack("16sh14x", b"lo", _IFF_UP | _IFF_LOOPBACK)
        fcntl.ioctl(control, _SIOCSIFFLAGS, request)
    names = NameService(FAILURES)
    authority = Authority(directory / "authority")
    with (
        Registry() as registry,
        Tls(authority.issue(NAME), registry.host, clients=authority.certificate) as front,
    ):
        registry.add_image("a/b", "1", os.urandom(5 << 20))
        own_etc(directory, f"{NAME}:{front.port}", authority)
        words = ["copy", f"{NAME}:{front.port}/a/b:1", f"oci:{directory}/out:1", "--quiet"]
        done = subprocess.run(
            [sys.executable, "-m", "rekindle", *words],
            env={**os.environ, "REKINDLE_HOME": str(directory / "home")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        print(
            json.dumps(
                {
                    "status": done.returncode,
                    "output": done.stdout + done.stderr,
                    "queries": names.queries,
                    "shown": sorted(set(front.shown)),
                }
            )
        )
    names.close()


def own_etc(directory: Path, host: str, authority: Authority) -> None:
    """Puts an /etc of ours in the place of the machine's: a name service, certs.d, and little else."""
    etc = directory / "etc"
    etc.mkdir()
    for name in {"passwd", "group", "ld.so.cache"} & {path.name for path in Path("/etc").iterdir()}:
        shutil.copy(Path("/etc") / name, etc / name)
    (etc / "hosts").write_text("127.0.0.1 localhost\n")
    (etc / "nsswitch.conf").write_text("hosts: files dns\n")
    (etc / "resolv.conf").write_text("nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    place = etc / "docker" / "certs.d" / host
    place.mkdir(parents=True)
    pair = authority.issue("node-7")
    shutil.copy(authority.certificate, place / "ca.crt")
    shutil.copy(pair.certificate, place / "client.cert")
    shutil.copy(pair.key, place / "client.key")
    subprocess.run(["mount", "--bind", str(etc), "/etc"], check=True, timeout=60)


class NameService:
    """Answers every question by 127.0.0.1, after so many failures (RFC 1035)."""

    def __init__(self, failures: int) -> None:
        self._failures = failures
        self.queries = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 53))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", ("127.0.0.1", 53))
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            query, client = self._socket.recvfrom(512)
            if not query:
                return
            self.queries += 1
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        end = query.index(b"\0", 12) + 5  # of the question: a name, a type and a class
        kind = struct.unpack("!H", query[end - 4 : end - 2])[0]
        if self.queries <= self._failures:
            flags, answers = 0x8180 | _SERVFAIL, b""
        else:
            address = struct.pack("!HHHIH", 0xC00C, _TYPE_A, 1, 60, 4) + bytes([127, 0, 0, 1])
            flags, answers = 0x8180, address if kind == _TYPE_A else b""
        counts = struct.pack("!HHHHH", flags, 1, int(bool(answers)), 0, 0)
        return query[:2] + counts + query[12:end] + answers


if __name__ == "__main__":
    main(Path(sys.argv[1]))
