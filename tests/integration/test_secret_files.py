# SPDX-License-Identifier: Apache-2.0
"""A restored server has read the secret files of today, and no record helps to guess what is in them.

Files that are mounted for each container or unit lie below /run: there, the server of these tests has a file
system of its own, made anew for every command, as a container runtime makes it.
"""

import hashlib
import json
import os
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Rekindle, free_port, listening, wait_for

pytestmark = pytest.mark.criu
PIN = "4711"
READ_AGAIN = "/run/secrets/kubernetes.io/serviceaccount/token"

SERVER = """
import http.server, json, os, pathlib, sys
options = dict(word.partition("=")[::2] for word in sys.argv[2:])
places = [
    options["--db-pass-file"], options["--ssl-keyfile"], options["--settings"], os.environ["APP_CONFIG"],
    os.environ["PGPASSFILE"], os.environ["APP_TOKEN_FILE"], "/run/secrets/signing", "/run/state/number",
    os.environ["CREDENTIALS_DIRECTORY"] + "/db",
]
loads = {pathlib.Path(place).name: pathlib.Path(place).read_text() for place in places}

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"fine": True, **(loads if self.path == "/loads" else {})}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    do_POST = do_GET
    def log_message(self, *words): pass

http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
RUN = {
    "secrets/pin": PIN,
    "secrets/signing": "sesame",
    "secrets/kubernetes.io/serviceaccount/token": "of the first pod",
    "app/config.json": '{"answer": 42}',
    "tls/..2026_01_01_00_00_00.1/tls.key": "a key",
    "state/number": "1",
    "credentials/first.service/db": "1234",
}
DISK = {"pgpass": "db:5432:*:app:hunter2", "settings.yaml": "answer: 42\nadmin_password: tiger\n"}


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


@dataclass(slots=True, kw_only=True)
class Deployed:
    """The server `app`, saved in a home of its own. `run` is what /run is made of for each command."""

    root: Path
    rekindle: Rekindle
    port: int

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def command(self) -> list[str]:
        return [
            *(sys.executable, str(self.root / "server.py"), str(self.port)),
            *("--db-pass-file=/run/secrets/pin", "--ssl-keyfile=/run/tls/tls.key"),
            f"--settings={self.root}/settings.yaml",
        ]

    @property
    def record(self) -> dict[str, Any]:
        return dict(self.rekindle("inspect", "app", "--json").json["record"])

    def match(self) -> dict[str, tuple[str, bool]]:
        """The code of the difference of each file, and whether it is hard."""
        done = self.rekindle("match", "app", "--json", "--", *self.command)
        assert done.status in {0, 3}, done.stderr
        return of_files(done.json["steps"][0]["reasons"])

    def restored(self) -> tuple[dict[str, Any], dict[str, str]]:
        """The report of a restore, and what the server that it brings up has read."""
        report, log = self.root / "report.json", self.root / "restore.log"
        report.unlink(missing_ok=True)
        process = self.rekindle.spawn("restore", "app", "--report", str(report), "--", *self.command, log=log)
        try:
            wait_for(lambda: report.exists() or process.poll() is not None, 60)
            assert process.poll() is None, log.read_text()
            wait_for(lambda: listening(self.port), 10)
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/loads", timeout=10) as response:
                return json.loads(report.read_text()), json.loads(response.read())
        finally:
            process.terminate()
            process.wait(30)


def of_files(reasons: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    return {each["field"]: (each["code"], each["hard"]) for each in reasons if each["field"].startswith("/")}


def lay_out(root: Path) -> None:
    write(root / "run", RUN)
    write(root, DISK)
    for name, target in (("..data", "..2026_01_01_00_00_00.1"), ("tls.key", "..data/tls.key")):
        (root / "run/tls" / name).symlink_to(target)  # as the kubelet does


def snapshot(deployed: Deployed, image: str = "app") -> None:
    done = deployed.rekindle(
        *("snapshot", image, "--ready-url", f"http://127.0.0.1:{deployed.port}/", "--no-cache"),
        *("--oracle-request", str(deployed.root / "oracle.json"), "--", *deployed.command),
    )
    assert done.status == 0, done.stderr


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    root = tmp_path_factory.mktemp("deployed")
    lay_out(root)
    oracle = {"method": "POST", "path": "/", "headers": {}, "body": {}, "select": ["/fine"]}
    write(root, {"server.py": SERVER, "oracle.json": json.dumps(oracle)})
    environment = {
        "TMPDIR": str(root),
        "APP_CONFIG": "/run/app/config.json",
        "PGPASSFILE": f"{root}/pgpass",
        "APP_TOKEN_FILE": READ_AGAIN,
        "CREDENTIALS_DIRECTORY": "/run/credentials/first.service",
    }
    mount = f'mount -t tmpfs none /run && cp -a {root}/run/. /run/ && exec "$@"'
    in_a_container = ["unshare", "--mount", "--propagation=private", "sh", "-c", mount, "sh"]
    rekindle = Rekindle(root / "home", environment, in_a_container)
    made = Deployed(root=root, rekindle=rekindle, port=free_port())
    snapshot(made)
    return made


@pytest.fixture
def deployed(_saved: Deployed) -> Iterator[Deployed]:
    """The snapshot; what a test changes is undone."""
    environment = dict(_saved.rekindle.env)
    yield _saved
    _saved.rekindle.env = environment
    shutil.rmtree(_saved.run)
    lay_out(_saved.root)


def test_the_files_of_the_snapshot_restore_the_process(deployed: Deployed) -> None:
    found = deployed.match()
    assert ("named-file", True) not in found.values(), found
    report, loads = deployed.restored()
    assert report["outcome"] == "restored", report["reasons"]
    assert loads["config.json"] == RUN["app/config.json"]


def test_a_named_configuration_below_run_is_compared_beforehand(deployed: Deployed) -> None:
    write(deployed.run, {"app/config.json": '{"answer": 43}'})
    assert deployed.match()["/run/app/config.json"] == ("named-file", True)
    report, loads = deployed.restored()
    assert (report["outcome"], loads["config.json"]) == ("cold", '{"answer": 43}')


SECRETS = {
    "an option names it": ("secrets/pin", "0815", "/run/secrets/pin"),
    "a link of the kubelet": ("tls/..2026_01_01_00_00_00.1/tls.key", "b key", "/run/tls/tls.key"),
    "by convention": ("secrets/signing", "abracadabra", "/run/secrets/signing"),
    "of a unit": ("credentials/first.service/db", "4321", "/run/credentials/first.service/db"),
}


@pytest.mark.parametrize("what", SECRETS)
def test_another_secret_file_forbids_the_process(deployed: Deployed, what: str) -> None:
    name, content, path = SECRETS[what]
    write(deployed.run, {name: content})
    assert deployed.match()[path] == ("secret-unknown", False), "it is compared once the process is there"
    report, loads = deployed.restored()
    assert (report["outcome"], loads[Path(path).name]) == ("cold", content)
    hard = {field: each for field, each in of_files(report["reasons"]).items() if each[1]}
    assert hard == {path: ("named-file", True)}
    assert content not in json.dumps(report)


@pytest.mark.parametrize(
    ("name", "old", "new"), [("pgpass", "hunter2", "hunter3"), ("settings.yaml", "tiger", "lions")]
)
def test_another_secret_in_a_file_on_the_disk_forbids_the_process(
    deployed: Deployed, name: str, old: str, new: str
) -> None:
    place = deployed.root / name
    place.write_text(place.read_text().replace(old, new))
    report, loads = deployed.restored()
    assert report["outcome"] == "cold"
    assert new in loads[name]


def test_a_missing_secret_file_is_known_beforehand(deployed: Deployed) -> None:
    (deployed.run / "secrets/pin").unlink()
    assert deployed.match()["/run/secrets/pin"] == ("named-file", True)


def test_another_unit_has_the_same_credentials(deployed: Deployed) -> None:
    (deployed.run / "credentials/first.service").rename(deployed.run / "credentials/second.service")
    deployed.rekindle.env["CREDENTIALS_DIRECTORY"] = "/run/credentials/second.service"
    report, _ = deployed.restored()
    assert report["outcome"] == "restored", report["reasons"]
    write(deployed.run, {"credentials/second.service/db": "4321"})
    report, _ = deployed.restored()
    assert report["outcome"] == "cold"


def test_what_a_platform_issues_anew_and_clients_read_again_is_no_difference(deployed: Deployed) -> None:
    write(
        deployed.run, {"secrets/kubernetes.io/serviceaccount/token": "of the next pod", "state/number": "2"}
    )
    (deployed.run / "tls/..2026_01_01_00_00_00.1").rename(deployed.run / "tls/..2026_02_02_00_00_00.2")
    (deployed.run / "tls/..data").unlink()
    (deployed.run / "tls/..data").symlink_to("..2026_02_02_00_00_00.2")
    report, _ = deployed.restored()
    assert report["outcome"] == "restored", report["reasons"]


def test_a_policy_softens_it(deployed: Deployed) -> None:
    write(deployed.run, {"secrets/pin": "0815"})
    policy = deployed.rekindle.home / "policy.toml"
    policy.write_text('[match]\nsoft = ["named-file"]\n')
    try:
        report, loads = deployed.restored()
    finally:
        policy.unlink()
    assert (report["outcome"], loads["pin"]) == ("restored", PIN)
    assert of_files(report["reasons"])["/run/secrets/pin"] == ("named-file", False)


def test_a_replica_that_is_saved_keeps_the_key(deployed: Deployed) -> None:
    words = ["restore", "app", "--detach", "--name", "web", "--require", "process", "--", *deployed.command]
    done = deployed.rekindle(*words)
    assert done.status == 0, done.stderr
    try:
        done = deployed.rekindle("snapshot", "again", "--replica", "web")
        assert done.status == 0, done.stderr
    finally:
        assert deployed.rekindle("stop", "web").status == 0
    restore = ["restore", "again", "--detach", "--name", "next", "--require", "process"]
    done = deployed.rekindle(*restore, "--", *deployed.command)
    assert done.status == 0, done.stderr
    assert deployed.rekindle("stop", "next").status == 0
    write(deployed.run, {"secrets/pin": "0815"})
    done = deployed.rekindle(*restore, "--", *deployed.command)
    assert done.status == 11, done.stderr
    assert "named-file: /run/secrets/pin" in done.stderr


def test_whoever_has_the_record_cannot_check_a_guess(deployed: Deployed) -> None:
    """Neither by a plain digest nor with anything else of the record, and another image has another."""
    files = {each["path"]: each for each in deployed.record["loaded"]["files"]}
    secret = {path for path, each in files.items() if each["identity"].startswith("keyed:")}
    assert secret == {path for _, _, path in SECRETS.values()} | {str(deployed.root / name) for name in DISK}
    assert {files[path]["size"] for path in secret} == {0}, "nor by its length"
    text = json.dumps(deployed.record)
    for content in (*(RUN[name] for name, _, _ in SECRETS.values()), *DISK.values()):
        assert hashlib.sha256(content.encode()).hexdigest()[:16] not in text
    first = files["/run/secrets/pin"]["identity"]
    salts = [word for word in text.replace('"', " ").split() if all(c in "0123456789abcdef" for c in word)]
    for salt in filter(lambda word: len(word) % 2 == 0 and len(word) <= 128, salts):
        guess = hashlib.blake2b(PIN.encode(), key=bytes.fromhex(salt), digest_size=32).hexdigest()
        assert first != f"keyed:{guess}"
    snapshot(deployed, "app:2")
    again = deployed.rekindle("inspect", "app:2", "--json").json["record"]["loaded"]["files"]
    assert first not in {each["identity"] for each in again}


def test_the_server_and_its_children_do_not_have_the_key(
    rekindle: Rekindle, port: int, tmp_path: Path
) -> None:
    write(
        tmp_path,
        {
            "server.py": "import http.server, os, subprocess, sys\n"
            "names = [*os.environ, *subprocess.check_output(['env'], text=True).split()]\n"
            "class Handler(http.server.SimpleHTTPRequestHandler):\n"
            "    def do_POST(self):\n"
            "        self.send_response(200); self.end_headers()\n"
            "        self.wfile.write(b'%d' % any('FILE_KEY' in each for each in names))\n"
            "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()\n",
            "oracle.json": '{"method": "POST", "path": "/", "headers": {}, "body": {}, "select": [""]}',
        },
    )
    report = tmp_path / "report.json"
    done = rekindle(
        *("snapshot", "app", "--report", str(report), "--ready-url", f"http://127.0.0.1:{port}/"),
        *("--no-prove", "--oracle-request", str(tmp_path / "oracle.json"), "--"),
        *(sys.executable, str(tmp_path / "server.py"), str(port)),
        env={"TMPDIR": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    assert done.status == 0, done.stderr
    record = rekindle("inspect", "app", "--json").json["record"]
    assert record["oracle"]["answer"] == {"status": 200, "values": [0]}
