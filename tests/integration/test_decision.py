# SPDX-License-Identifier: Apache-2.0
"""A decision with a warm store is quick because of what it does not do: `hack/bench-decision` measures it."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SERVERS, Rekindle

pytestmark = pytest.mark.criu

WATCHED = """
import json, sys
opened, events = [], {}
def note(event, arguments):
    events[event] = events.get(event, 0) + 1
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        opened.append(arguments[0] if isinstance(arguments[0], str) else arguments[0].decode())
sys.addaudithook(note)
from rekindle.__main__ import main
status = main(["restore", "horse", "--plan", "--json"])
print(json.dumps({"status": status, "opened": opened, "events": events, "modules": [*sys.modules]}),
      file=sys.stderr)
"""
NOT_DONE = {
    *("subprocess.Popen", "os.posix_spawn", "os.fork", "os.exec", "os.system"),
    *("socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request"),
}
NOT_IMPORTED = {
    *(
        "torch",
        "vllm",
        "numpy",
        "ssl",
        "http.client",
        "asyncio",
        "email",
        "logging",
        "psutil",
        "yaml",
        "rich",
    ),
    *("sigstore", "requests", "urllib3", "oras", "zstandard", "concurrent.futures", "tempfile", "snapshot"),
}
LIBRARIES = ("/lib/python3", "/site-packages/", "__pycache__", "/lib/x86_64-linux-gnu/", "libpython")
FILES_LIMIT, MODULES_LIMIT = 150, 310  # 95 and 274 here; more of them is what would make it slow


def decide(rekindle: Rekindle) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        env=rekindle.environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return dict(json.loads(done.stderr.splitlines()[-1]))


def test_a_decision_with_a_warm_store_reads_no_file_of_the_server(rekindle: Rekindle, port: int) -> None:
    done = rekindle.snapshot_workhorse("horse", port)
    assert done.status == 0, done.stderr
    time.sleep(2.1)  # a later change would not be noticed by times that are younger
    record = rekindle("inspect", "horse", "--json").json["record"]
    files = {each["path"] for each in record["mapped_files"]}
    files |= {each["path"] for each in record["loaded"]["files"]}
    for directory in record["loaded"]["code"]:
        files |= {f"{directory['path']}/{name}" for name in directory["files"]}
    # Not what this Python reads itself.
    files = {path for path in files if not any(each in path for each in LIBRARIES) and path.startswith("/")}
    files -= {str(Path(sys.executable).resolve()), sys.executable, f"{sys.prefix}/pyvenv.cfg"}
    script = str(SERVERS / "workhorse.py")
    assert script in files
    shutil.rmtree(rekindle.home / "compared")  # the proof has left its findings
    first = decide(rekindle)
    assert first["status"] == 0
    assert script in first["opened"], "contents are compared once"
    warm = decide(rekindle)
    assert warm["status"] == 0
    assert files & {*warm["opened"]} == set()
    assert not NOT_DONE & {*warm["events"]}
    assert not NOT_IMPORTED & {*warm["modules"]}
    beside = [path for path in warm["opened"] if not any(each in path for each in LIBRARIES)]
    beside = [path for path in beside if not path.endswith((".py", ".so"))]
    assert len(beside) < FILES_LIMIT, beside
    assert len(warm["modules"]) < MODULES_LIMIT
