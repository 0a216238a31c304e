# SPDX-License-Identifier: Apache-2.0
"""What the pages name is there: files, sections, and modules of the tree."""

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(r"`((?:cli|oci|rekindle|restore|snapshot|hack|tests|docs)/[\w./-]*)`")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def prose(page: Path) -> str:
    """The text of a page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The names by which links lead to a page's headings, as code hosts make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def test_there_are_pages() -> None:
    assert {"README.md", "docs/architecture.md", "docs/adr/0024-house.md"} <= set(map(name, PAGES))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_path_that_is_named_is_there(page: Path) -> None:
    for path in PATH.findall(prose(page)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_page_can_be_reached(page: Path) -> None:
    """From the README, by links, in two steps at most."""
    here = {ROOT / "README.md"}
    for _ in range(2):
        for each in list(here):
            found = [(each.parent / link.partition("#")[0]).resolve() for link in LINK.findall(prose(each))]
            here |= {path for path in found if path.suffix == ".md" and path.exists()}
            here |= {inner for path in found if path.is_dir() for inner in path.glob("*.md")}
    assert page in here


def test_what_can_differ_from_a_start_of_today_names_rules_and_tests_that_exist() -> None:
    from hack.docs.matching_page import TODAY_ROWS
    from restore.decide.rules import RULES

    for _, done, tests in TODAY_ROWS:
        words = re.findall(r"`([a-z-]+)`", done)
        assert set(words) - {"--publish"} <= set(RULES)
        places = [
            path if "/" in path else f"tests/integration/{path}" for path in re.findall(r"`([^`]+)`", tests)
        ]
        assert places
        assert all((ROOT / path).is_file() for path in places), tests


def test_the_tests_that_hold_what_gpus_may_do_exist() -> None:
    page = (ROOT / "docs/gpu/risks.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) > 10
    there = {
        each
        for path in (ROOT / "tests").rglob("test_*.py")
        for each in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert not named - there
