# SPDX-License-Identifier: Apache-2.0
"""The dashboard tells nothing and does nothing for others: without the token, by another name, or by a page
of another site."""

import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cli import _dashboard_server
from cli._dashboard_server import ACTIONS, DashboardServer
from cli._dashboard_state import DashboardState
from rekindle import history
from rekindle.home import Home
from rekindle.replicas import register
from rekindle.report import ImageName, Outcome, Report, Rung
from rekindle.run import Completed
from tests.conftest import ROOT, Rekindle, wait_for

FILES = ROOT / "cli" / "dashboard_files"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def server(home: Home) -> Iterator[DashboardServer]:
    with DashboardServer(home, 0) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the buttons would have run."""
    commands: list[list[str]] = []

    def run(argv: list[str], timeout: float) -> Completed:
        commands.append(argv)
        return Completed(tuple(argv), 7, "what it said\n", 0)

    monkeypatch.setattr(_dashboard_server, "run", run)
    return commands


def ask(
    server: DashboardServer,
    path: str,
    *,
    method: str = "GET",
    body: object = None,
    headers: Mapping[str, str | None] | None = None,
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Ask as the page does, but for the headers that are given; None leaves one out."""
    asked: dict[str, str | None] = {
        "Host": f"127.0.0.1:{server.server_port}",
        "Authorization": f"Bearer {server.token}",
        "Content-Type": "application/json",
        **(headers or {}),
    }
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    content = b"" if body is None else json.dumps(body).encode()
    for name, value in {"Content-Length": str(len(content)), **asked}.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(content)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    is_json = response.headers["Content-Type"] == "application/json"
    return response.status, json.loads(text) if is_json else text.decode(), response.headers


def test_it_listens_on_loopback_only(server: DashboardServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert server.address == f"http://127.0.0.1:{server.server_port}/#{server.token}"
    assert len(server.token) >= 40


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css"])
def test_the_page_holds_no_data_and_no_token(server: DashboardServer, path: str) -> None:
    status, text, headers = ask(server, path, headers={"Authorization": None})
    assert status == 200
    assert server.token not in text
    assert str(server.home.root) not in text
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "Access-Control-Allow-Origin" not in headers


def test_the_page_needs_nothing_from_elsewhere() -> None:
    for path in FILES.iterdir():
        text = path.read_text()
        assert not re.findall(r"(?:https?:)?//(?!\s)[a-z0-9.-]+\.[a-z]{2,}", text), path
    page = (FILES / "page.html").read_text()
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,", "/page.css", "/page.js"]
    assert not re.findall(r"<script>|<style|\son\w+=|style=", page)


def test_text_is_never_html() -> None:
    script = (FILES / "page.js").read_text()
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function"
    assert not re.findall(forbidden, script)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": None}, 401),
        ({"Authorization": "Bearer "}, 401),
        ({"Authorization": "Bearer wrong"}, 401),
        ({"Authorization": "Bearer \u00e9"}, 401),
        ({"Host": "evil.example.com"}, 421),
        ({"Host": "evil.example.com:{port}"}, 421),
        ({"Host": "127.0.0.1"}, 421),
        ({"Host": "127.0.0.1:{port}.evil.example.com"}, 421),
        ({"Host": None}, 421),
        ({"Host": "localhost:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://evil.example.com"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
    ],
)
@pytest.mark.parametrize("path", ["/api/state", "/api/stop"])
def test_others_are_refused(
    server: DashboardServer, ran: list[list[str]], path: str, headers: dict[str, str | None], status: int
) -> None:
    given = {
        name: value and value.replace("{port}", str(server.server_port)) for name, value in headers.items()
    }
    method = "POST" if path == "/api/stop" else "GET"
    with register(server.home, "web", "tiny"):
        got, answer, _ = ask(server, path, method=method, body={"name": "web"}, headers=given)
    assert got == status, answer
    assert bool(ran) == (path == "/api/stop" and status == 200)
    if status != 200:
        assert list(answer) == ["error"]


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_a_button_runs_a_command(server: DashboardServer, ran: list[list[str]], action: str) -> None:
    with register(server.home, "web", "tiny"):
        status, answer, _ = ask(server, f"/api/{action}", method="POST", body={"name": "web"})
    assert (status, answer) == (200, {"status": 7, "output": "what it said\n"})
    assert [argv[-4:] for argv in ran] == [["-m", "rekindle", action, "web"]]


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/api/stop", {"name": "other"}, {}, 404),
        ("/api/stop", {"name": "--help"}, {}, 404),
        ("/api/stop", {"name": "../web"}, {}, 404),
        ("/api/stop", {"name": ["web"]}, {}, 400),
        ("/api/stop", ["web"], {}, 400),
        ("/api/stop", {"name": "w" * 5000}, {}, 413),
        ("/api/stop", {"name": "web"}, {"Content-Length": "-1"}, 413),
        ("/api/stop", {"name": "web"}, {"Content-Length": "x"}, 413),
        ("/api/stop", {"name": "web"}, {"Content-Type": "text/plain"}, 415),
        ("/api/stop", {"name": "web"}, {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("/api/exec", {"name": "web"}, {}, 404),
        ("/stop", {"name": "web"}, {}, 404),
    ],
)
def test_nothing_else_becomes_a_command(
    server: DashboardServer,
    ran: list[list[str]],
    path: str,
    body: object,
    headers: dict[str, str | None],
    status: int,
) -> None:
    with register(server.home, "web", "tiny"):
        assert ask(server, path, method="POST", body=body, headers=headers)[0] == status
        assert ask(server, path)[0] == 404, "a link or an image does nothing"
    assert not ran


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"])
def test_other_methods_do_nothing(server: DashboardServer, ran: list[list[str]], method: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, "/api/stop", headers={"Authorization": f"Bearer {server.token}"})
    assert connection.getresponse().status == 501
    connection.close()
    assert not ran


def test_who_says_nothing_keeps_no_one_waiting(server: DashboardServer) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port)):
        assert ask(server, "/api/state")[0] == 200


@pytest.mark.parametrize("path", ["/page.py", "/../dashboard.py", "/%2e%2e/dashboard.py", "/api/"])
def test_no_other_file_is_served(server: DashboardServer, path: str) -> None:
    assert ask(server, path)[0] == 404


def test_the_state_is_that_of_the_home(home: Home) -> None:
    state = DashboardState(home)
    assert state.document()["replicas"] == []
    made = Report(verb="restore", outcome=Outcome.CACHE, first_token_seconds=3.0)
    made.image, made.replica = ImageName(reference="tiny"), "web"
    history.add(home, made.to_json(), at=5.0)
    with register(home, "web", "tiny", detached=True) as registration:
        registration.ready(rung=Rung.CACHE, digest="", endpoint="127.0.0.1:8000", cell_init=None)
        found = state.document()
        (web,) = found["replicas"]
        assert (web["name"], web["state"], web["actions"]) == ("web", "ready", ["stop"])
        assert set(web["memory"]) == {"own_bytes", "shared_bytes"}
    (start,) = found["starts"]
    assert (start["replica"], start["outcome"], start["at"]) == ("web", "cache", 5.0)
    assert found["summary"]["first_token_seconds"] is None, "none was restored"
    json.dumps(found)


def test_the_command_prints_the_address_and_ends_at_a_signal(tmp_path: Path) -> None:
    rekindle = Rekindle(tmp_path / "home")
    with open(tmp_path / "address", "wb") as out:
        process = rekindle.spawn("dashboard", "--port", "0", log=tmp_path / "log", stdout=out)
    wait_for(lambda: (tmp_path / "address").read_text().endswith("\n"), 20)
    address = (tmp_path / "address").read_text().strip()
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/#[\w-]{40,}", address)
    port = address.split("/#")[0].rpartition(":")[2]
    assert rekindle("dashboard", "--port", port).status == 13
    process.terminate()
    assert process.wait(20) == 0
