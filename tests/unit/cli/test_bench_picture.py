# SPDX-License-Identifier: Apache-2.0
"""A picture is well-formed, and its bars are as long as their phases."""

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli._bench_picture import Bar, draw

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ["<script>", "a & b", "]]>", "'\"", "<!--", "-->", "&#0;", "é中☃", " ", "", "a" * 500, "%s {0} \\"]


def parsed(title: str, bars: list[Bar]) -> ElementTree.Element:
    return ElementTree.fromstring(draw(title, bars))


def bars_of(root: ElementTree.Element) -> list[tuple[str, float]]:
    """The (title, width) of the rectangles that are phases."""
    found = []
    for rectangle in root.iter(f"{SVG}rect"):
        title = rectangle.find(f"{SVG}title")
        if title is not None:
            found.append((title.text or "", float(rectangle.attrib["width"])))
    return found


def texts(root: ElementTree.Element) -> list[str]:
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def test_widths_are_as_the_seconds() -> None:
    bars = [Bar(name="cold", phases={"load": 6.0, "compile": 2.0}), Bar(name="warm", phases={"load": 4.0})]
    widths = bars_of(parsed("starts", bars))
    assert widths == [("load: 6.000 s", 465.0), ("compile: 2.000 s", 155.0), ("load: 4.000 s", 310.0)]


def test_names_sums_and_phases_are_written() -> None:
    found = texts(parsed("starts", [Bar(name="cold", phases={"load": 6.0, "compile": 2.0})]))
    assert found == ["starts", "cold", "8.00 s", "load", "compile"]


def test_a_note_stands_behind_the_seconds() -> None:
    found = texts(parsed("starts", [Bar(name="cold", phases={"load": 6.0}, note="8x")]))
    assert found == ["starts", "cold", "6.00 s, 8x", "load"]


def test_a_phase_that_cannot_be_seen_is_not_in_the_legend() -> None:
    bars = [Bar(name="cold", phases={"load": 60.0, "wink": 0.01}), Bar(name="process", phases={"read": 0.05})]
    assert texts(parsed("starts", bars))[-2:] == ["load", "read"]


def test_short_bars_are_drawn_again() -> None:
    root = parsed(
        "starts", [Bar(name="cold", phases={"all": 60.0}), Bar(name="process", phases={"all": 1.0})]
    )
    assert "magnified 60 times" in texts(root)
    assert [width for _, width in bars_of(root)] == [620.0, 10.33, 620.0]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text(name: str) -> None:
    bars = [Bar(name=name, phases={name: 20.0, f"{name}2": 1.0}), Bar(name=f"{name}'", phases={name: 1.0})]
    root = parsed(name, bars)
    assert texts(root)[0] == name
    assert {element.tag for element in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "rect", "text", "title")
    }


@pytest.mark.parametrize("name", ["\0", "\x1b[31m", "\ufffe", "\ud800"])
def test_a_name_of_no_characters_is_text(name: str) -> None:
    parsed(name, [Bar(name=name, phases={name: 1.0})])


printable = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="\ufffe\uffff"), max_size=20
)


@given(
    printable,
    st.lists(
        st.builds(
            Bar,
            name=printable,
            phases=st.dictionaries(printable, st.floats(0.001, 1e6), min_size=1, max_size=12),
        ),
        max_size=6,
    ),
)
def test_any_names_and_seconds_are_well_formed(title: str, bars: list[Bar]) -> None:
    root = parsed(title, bars)
    assert len(bars_of(root)) >= sum(len(bar.phases) for bar in bars)
    assert all(0 <= width <= 620.01 for _, width in bars_of(root))


def test_every_element_lies_within_the_picture() -> None:
    phases = {f"phase number {number}": 1.0 for number in range(40)}
    root = parsed("starts", [Bar(name="cold", phases=phases)])
    height, width = float(root.attrib["height"]), float(root.attrib["width"])
    for element in root:
        assert float(element.attrib.get("y", 0)) < height
        assert float(element.attrib.get("x", 0)) < width


def test_there_may_be_no_bars() -> None:
    assert bars_of(parsed("starts", [])) == []


def test_all_bars_may_be_empty() -> None:
    root = parsed("starts", [Bar(name="a", phases={}), Bar(name="b", phases={"x": 0.0})])
    assert bars_of(root) == [("x: 0.000 s", 0.0)]


@pytest.mark.parametrize("phases", [{}, {"load": 0.0}])
def test_one_bar_may_be_empty(phases: dict[str, float]) -> None:
    parsed("starts", [Bar(name="a", phases={"load": 1.0}), Bar(name="b", phases=phases)])
