# SPDX-License-Identifier: Apache-2.0
"""A person looks at servers in a real browser, and wakes, hibernates and stops them there."""

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rekindle import history
from rekindle.errors import TrustError
from rekindle.home import Home
from rekindle.report import ImageName, Report
from tests.conftest import BROWSER, Rekindle, Replica, free_port, listening, need, wait_for
from tests.servers.browser import Browser

pytestmark = [pytest.mark.criu, pytest.mark.timeout(300)]


@pytest.fixture
def browser() -> Iterator[Browser]:
    need(BROWSER.exists(), "a browser", "run hack/get-browser")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        made = Browser(BROWSER, Path(profile))
        try:
            made.resize(1240, 900)
            yield made
        finally:
            made.close()


@contextlib.contextmanager
def dashboard(rekindle: Rekindle, place: Path) -> Iterator[str]:
    with open(place / "address", "wb") as out:
        process = rekindle.spawn("dashboard", "--port", "0", log=place / "log", stdout=out)
    try:
        wait_for(lambda: (place / "address").read_text().endswith("\n"), 20)
        yield (place / "address").read_text().strip()
    finally:
        process.terminate()
        assert process.wait(20) == 0


def row(name: str) -> str:
    return f"document.querySelector('tr[data-name={json.dumps(name)}]')?.innerText"


def complaints(browser: Browser) -> list[dict[str, Any]]:
    """What the browser's console has, such as violations of the policy of what a page may load."""
    return [
        event for event in browser.events if event["method"] in {"Log.entryAdded", "Runtime.exceptionThrown"}
    ]


def test_servers_are_shown_woken_and_stopped(
    rekindle: Rekindle, horse_port: int, tmp_path: Path, browser: Browser
) -> None:
    port = free_port()
    done = rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port))
    assert done.status == 0, done.stderr
    replica = Replica(None, port, Path(), {})  # type: ignore[arg-type]
    assert replica.ask("/count", {}) == "1"
    with dashboard(rekindle, tmp_path) as address:
        browser.open(address)
        browser.wait(f"{row('web')}.includes('ready')")
        text = browser.evaluate(row("web"))
        assert "horse" in text
        assert f":{port}" in text
        assert "MB own" in text
        assert browser.evaluate("location.href") == address.split("#")[0], "the token is out of sight"

        browser.wait("document.querySelector('#starts .bar i')")
        bars = browser.evaluate(
            "[...document.querySelectorAll('#starts .bar i')]"
            ".map((e) => [e.title, e.getBoundingClientRect().width])"
        )
        titles = [title.partition(":")[0] for title, _ in bars]
        assert {"start", "decide", "restore", "oracle"} <= set(titles)
        assert sum(width for _, width in bars) > 100
        image = browser.evaluate("document.querySelector('tr[data-image=\"horse:latest\"]').innerText")
        assert "signed" in image
        assert "CRIU" in image

        browser.click("[data-key='hibernate web']")
        browser.wait("document.querySelector('[data-key=\"hibernate web\"].armed')")
        assert listening(port), "one click only asks"
        browser.click("[data-key='hibernate web']")
        browser.wait(f"{row('web')}.includes('hibernated')")
        assert not listening(port)

        browser.click("[data-key='wake web']")
        browser.wait(f"{row('web')}.includes('ready')")
        assert replica.ask("/count", {}) == "2", "it has its state"
        browser.wait("document.querySelector('#starts').innerText.includes('wake of')")

        browser.click("[data-key='stop web']")
        browser.click("[data-key='stop web'].armed")
        browser.wait(f"{row('web')}.includes('ended')")
        assert not listening(port)
        assert not complaints(browser)


def test_a_failure_is_shown(rekindle: Rekindle, horse_port: int, tmp_path: Path, browser: Browser) -> None:
    port = free_port()
    flags = ("--detach", "--name", "web", "--publish", str(port))
    assert rekindle("restore", "horse", *flags).status == 0
    assert rekindle("hibernate", "web").status == 0
    assert rekindle("rm", "hibernated/web").status == 0
    with dashboard(rekindle, tmp_path) as address:
        browser.open(address)
        browser.click("[data-key='wake web']")
        browser.wait("document.querySelector('#message').innerText.includes('wake web failed')")
        browser.wait(f"{row('web')}.includes('hibernated')")
    assert rekindle("stop", "web").status == 0


def test_a_page_of_another_site_reaches_nothing(
    rekindle: Rekindle, horse_port: int, tmp_path: Path, browser: Browser
) -> None:
    """It knows the address, and runs in the same browser, in which the dashboard is open."""
    port = free_port()
    assert rekindle("restore", "horse", "--detach", "--name", "web", "--publish", str(port)).status == 0
    with dashboard(rekindle, tmp_path) as address:
        ours = address.split("#")[0]
        browser.open(address)
        browser.wait(f"{row('web')}.includes('ready')")
        browser.open("data:text/html,<title>evil</title>")
        browser.wait("document.title == 'evil'")
        for options in (
            "{method: 'POST', mode: 'no-cors', credentials: 'include', body: '{\"name\": \"web\"}'}",
            "{method: 'POST', headers: {'Content-Type': 'application/json'}, body: '{\"name\": \"web\"}'}",
        ):
            browser.evaluate(f"fetch('{ours}api/stop', {options}).then((r) => r.text(), (e) => String(e))")
        read = browser.evaluate(f"fetch('{ours}api/state').then((r) => r.text(), (e) => 'no')")
        assert read == "no"
        browser.evaluate(f"void open('{ours}api/stop')")
        assert listening(port)

        browser.open(f"{ours}#wrong")
        browser.wait("document.querySelector('#live').innerText.includes('open the address')")
        assert not browser.evaluate("document.querySelector('tr[data-name]')")
    assert listening(port)
    assert rekindle("stop", "web").status == 0


def test_names_are_text(rekindle: Rekindle, tmp_path: Path, browser: Browser) -> None:
    """An error may hold what an image from elsewhere says."""
    image = "<img src=x onerror=document.title=1>"
    failed = Report(verb="restore", image=ImageName(reference=image))
    failed.fail(TrustError(image))
    history.add(Home(rekindle.home), failed.to_json(), at=1.0)
    with dashboard(rekindle, tmp_path) as address:
        browser.open(address)
        browser.wait("document.querySelector('#starts .start')")
        assert browser.evaluate("document.querySelector('#starts').innerText").count(image) >= 2
        assert not browser.evaluate("document.querySelectorAll('main img').length")
        assert browser.evaluate("document.title") == "rekindle"


def test_light_and_dark_can_be_read(rekindle: Rekindle, tmp_path: Path, browser: Browser) -> None:
    with dashboard(rekindle, tmp_path) as address:
        for scheme, is_dark in (("light", False), ("dark", True)):
            browser.prefer(scheme)
            browser.open(address)
            browser.wait("document.querySelector('#servers .empty')")
            colours = browser.evaluate(
                "['color', 'backgroundColor']"
                ".map((n) => getComputedStyle(document.body)[n].match(/\\d+/g).map(Number))"
            )
            text, page = (sum(colour[:3]) for colour in colours)
            assert (text > page) == is_dark
            assert abs(text - page) > 400
