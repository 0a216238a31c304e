# SPDX-License-Identifier: Apache-2.0
"""The programs of docs/library.md run as they stand there, but for ports and the registry's name."""

import re
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT, SERVERS, KeyPair, Rekindle, free_port, listening, wait_for
from tests.servers.registry.simulator import Registry

BLOCK = re.compile(r"^```(?:python|toml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROGRAMS = ["save.py", "ask.py", "serve.py", "move.py"]


def blocks() -> dict[str, str]:
    return dict(BLOCK.findall((ROOT / "docs/library.md").read_text()))


def test_every_block_has_a_name() -> None:
    text = (ROOT / "docs/library.md").read_text()
    assert [name for name in blocks() if name.endswith(".py")] == PROGRAMS
    assert len(blocks()) == text.count("```") / 2


@pytest.mark.criu
def test_the_programs_do_what_the_page_says(
    rekindle: Rekindle, key_pair: KeyPair, tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    shutil.copy(SERVERS / "workhorse.py", place / "server.py")
    shutil.copy(SERVERS / "oracle.json", place)
    for kind in ("key", "pub"):
        shutil.copy(f"{key_pair.prefix}.{kind}", place / f"cosign.{kind}")
    published = free_port()
    environment = rekindle.environment(
        {"PATH": f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"}
    )

    def start(name: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, name],
            cwd=place,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(name: str) -> list[str]:
        output, _ = (process := start(name)).communicate(timeout=100)
        assert process.returncode == 0, name
        return output.splitlines()

    with Registry() as registry:
        instead = {
            "registry.example.com": registry.host,
            "8000": str(free_port()),
            "8001": str(published),
        }
        for name, text in blocks().items():
            (place / name).write_text(re.sub("|".join(instead), lambda found: instead[found[0]], text))

        (saved,) = run("save.py")
        digest = saved.partition(": ")[0]
        assert re.fullmatch(r"sha256:[0-9a-f]{64}: [0-9,]+ bytes", saved)

        assert run("ask.py") == [
            "process possible",
            "cache no-cache: the image holds no kernel cache",
            "cold possible",
        ]

        serving = start("serve.py")
        assert serving.stdout is not None
        line = serving.stdout.readline()
        assert re.fullmatch(rf"restored 127\.0\.0\.1:{published} \d+\.\d\d s\n", line)
        wait_for(lambda: listening(published), 10)
        with urllib.request.urlopen(f"http://127.0.0.1:{published}/health", timeout=30) as answer:
            assert answer.status == 200
        serving.send_signal(signal.SIGTERM)
        serving.communicate(timeout=30)
        assert serving.returncode == 7  # the server's own status

        sent, signed, refused = run("move.py")
        assert re.fullmatch(r"sent [0-9,]{6,} bytes", sent)
        assert signed.startswith(f"{digest} was signed by key ")
        assert refused.startswith("without a policy: nothing says whom to trust")
    nothing_left()
