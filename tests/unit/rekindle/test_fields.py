# SPDX-License-Identifier: Apache-2.0
"""JSON and TOML from outside become typed values, or an error that names the field."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekindle.errors import FormatError
from rekindle.fields import Fields, text_item

VALUES: list[object] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    1.5,
    "",
    "text",
    [],
    ["x"],
    [1],
    {},
    {"a": "b"},
    {"a": 1},
]
HERE = Fields({str(index): value for index, value in enumerate(VALUES)}, "here")

GETTERS: dict[str, tuple[Callable[[str], object], list[object]]] = {
    "text": (HERE.text, ["", "text"]),
    "integer": (HERE.integer, [0, 1]),
    "a negative integer": (lambda name: HERE.integer(name, at_least=-5), [0, 1, -1]),
    "a small integer": (lambda name: HERE.integer(name, at_most=0), [0]),
    "texts": (HERE.texts, [[], ["x"]]),
    "a short list of texts": (lambda name: HERE.texts(name, at_most=0), [[]]),
    "text map": (HERE.text_map, [{}, {"a": "b"}]),
    "any": (HERE.json, VALUES),
}


@pytest.mark.parametrize(("get", "wanted"), GETTERS.values(), ids=GETTERS)
def test_only_values_of_the_type_are_given(get: Callable[[str], object], wanted: list[object]) -> None:
    given_back = []
    for index, value in enumerate(VALUES):
        if any(value is one or (type(value) is type(one) and value == one) for one in wanted):
            given_back.append(get(str(index)))
        else:
            with pytest.raises(FormatError, match=rf"^here\.{index}\b"):
                get(str(index))
    assert given_back == wanted


@pytest.mark.parametrize("get", [HERE.text, HERE.integer, HERE.texts, HERE.text_map, HERE.json, HERE.inner])
def test_a_missing_field_is_named(get: Callable[[str], object]) -> None:
    with pytest.raises(FormatError, match=r"here\.none"):
        get("none")


def test_a_missing_text_may_have_a_default() -> None:
    assert HERE.text("none", "default") == "default"
    with pytest.raises(FormatError):
        HERE.text("3", "default")


def test_a_missing_map_may_have_a_default() -> None:
    assert HERE.text_map("none", {"a": "b"}) == {"a": "b"}
    with pytest.raises(FormatError):
        HERE.text_map("3", {})


def test_a_field_may_be_asked_for() -> None:
    assert HERE.has("0")
    assert not HERE.has("none")


def test_an_inner_object_says_where_it_is() -> None:
    fields = Fields({"a": {"b": {"c": 5}}, "list": [{"d": 1}, {"d": "x"}]}, "top")
    with pytest.raises(FormatError, match=r"^top\.a\.b\.c is not text$") as caught:
        fields.inner("a").inner("b").text("c")
    assert caught.value.cause == "5"
    with pytest.raises(FormatError, match=r"^top\.list\[0\]\.d is not text$"):
        fields.list_of("list", lambda item, where: Fields(item, where).text("d"), at_most=2)
    with pytest.raises(FormatError, match=r"^top\.list is not a list of at most 1$"):
        fields.list_of("list", lambda item, where: item, at_most=1)
    with pytest.raises(FormatError, match=r"^top\.list is not a JSON object$"):
        fields.inner("list")


def test_an_item_that_is_no_text_is_named() -> None:
    assert text_item("text", "x") == "text"
    with pytest.raises(FormatError, match=r"^here\.list\[1\] is not text$"):
        Fields({"list": ["a", 5]}, "here").texts("list")


@pytest.mark.parametrize("value", [None, 5, "text", [], [{}]])
def test_what_is_no_object_is_refused(value: object) -> None:
    with pytest.raises(FormatError, match="top is not a JSON object"):
        Fields(value, "top")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"{}{}", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"[]", b"nul"]
)
def test_what_is_no_json_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError, match="top"):
        Fields.parse(content, "top", limit_bytes=1 << 20)


def test_a_document_may_be_as_long_as_the_limit() -> None:
    Fields.parse(b"{}", "top", limit_bytes=2)
    with pytest.raises(FormatError, match="longer than 1 bytes"):
        Fields.parse(b"{}", "top", limit_bytes=1)


def test_toml_is_an_object_too() -> None:
    fields = Fields.parse_toml(b"[a]\nb = 5", "top", limit_bytes=9)
    with pytest.raises(FormatError, match=r"^top\.a\.b is not text$"):
        fields.inner("a").text("b")
    with pytest.raises(FormatError, match="top is longer than 8 bytes"):
        Fields.parse_toml(b"[a]\nb = 5", "top", limit_bytes=8)


@pytest.mark.parametrize(
    "content", [b"{}", b"a", b"a = ", b"a = 1\na = 2", b"\xff", b"\0", b"a = " + b"[" * 100_000]
)
def test_what_is_no_toml_is_refused(content: bytes) -> None:
    with pytest.raises(FormatError, match="top is not TOML"):
        Fields.parse_toml(content, "top", limit_bytes=1 << 20)


def test_a_long_value_is_not_repeated_whole() -> None:
    with pytest.raises(FormatError) as caught:
        Fields({"a": "x" * 100_000}, "top").integer("a")
    assert len(caught.value.cause) <= 80


@given(st.binary(max_size=100))
def test_random_bytes_are_an_object_or_refused(content: bytes) -> None:
    try:
        Fields.parse(content, "top", limit_bytes=100)
    except FormatError:
        return
    assert content.strip().decode("utf-8", "replace")
