# SPDX-License-Identifier: Apache-2.0
"""The JSON schemas in docs/schemas are those of the documents that are written and read."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hack.docs.schemas import DOCUMENTS, schema
from oci.cache.inventory import Inventory
from rekindle.errors import FormatError
from rekindle.record import Record
from tests.conftest import ROOT
from tests.samples.record import document

INVENTORY: dict[str, Any] = {
    "schema": "rekindle.inventory/1",
    "made_by": "rekindle 0.1.0",
    "roots": [
        {
            "kind": "triton",
            "recorded": "/root/.triton/cache",
            "prefix": "io.vllm.cache/triton",
            "layer": 0,
            "files": 8,
            "bytes": 26200,
            "entries": [
                {
                    "key": "XTN6",
                    "targets": [{"backend": "hip", "arch": "gfx942", "warp_size": 64}],
                    "versions": {"triton": "3.9.0"},
                    "files": 8,
                    "bytes": 26200,
                    "digest": f"sha256:{'0' * 64}",
                }
            ],
        }
    ],
}
PAGES: dict[str, Any] = {"path": "memory/7", "kind": "file", "size": 8192, "mode": 0o600, "uid": 0, "gid": 0}
MEMORY = {"path": "memory/7", "data_bytes": 4096, "ranges": [[4096, 12288]], "working_set": [[0, 4096]]}


def record() -> dict[str, Any]:
    """A record of a dump with a memory file."""
    value = {**document(), "schema": "rekindle.record/2"}
    value["dump"]["files"].append({**PAGES, "mtime_ns": 0})
    value["dump"]["memory"] = [MEMORY]
    return value


WHOLE: dict[str, dict[str, Any]] = {"record": record(), "inventory": INVENTORY}
READ: dict[str, Callable[[Any], object]] = {
    "record": lambda value: Record.parse(json.dumps(value).encode()),
    "inventory": Inventory.from_json,
}
CHECK = {name: jsonschema.Draft202012Validator(schema(kind)) for name, kind in DOCUMENTS.items()}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


PLACES = {name: list(places(value)) for name, value in WHOLE.items()}
ODD: list[Any] = [None, True, 0, 1, -1, 1 << 70, 0.5, "", "/", "x", "criu/x", "file", [], {}, [[]], {"": 0}]
VALUES: st.SearchStrategy[Any] = st.sampled_from(ODD) | st.integers() | st.text(max_size=5)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_published_schema_is_up_to_date(name: str) -> None:
    published = (ROOT / f"docs/schemas/{name}.json").read_text()
    assert published == json.dumps(schema(DOCUMENTS[name]), indent=2) + "\n"
    CHECK[name].check_schema(json.loads(published))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_is_valid_and_has_no_field_that_the_schema_lacks(name: str) -> None:
    CHECK[name].validate(WHOLE[name])
    strict = json.loads(json.dumps(schema(DOCUMENTS[name])))
    for part in strict["$defs"].values():
        if part.get("type") == "object":
            part["additionalProperties"] = False
    jsonschema.Draft202012Validator(strict).validate(WHOLE[name])


def test_a_record_of_before_is_valid() -> None:
    before = document()
    assert before["schema"] == "rekindle.record/1"
    CHECK["record"].validate(before)


@pytest.mark.parametrize("name", DOCUMENTS)
@given(data=st.data())
def test_what_is_read_is_valid(name: str, data: st.DataObject) -> None:
    value = copy.deepcopy(WHOLE[name])
    path = data.draw(st.sampled_from(PLACES[name]))
    outer = value
    for step in path[:-1]:
        outer = outer[step]
    if data.draw(st.booleans()):
        outer[path[-1]] = data.draw(VALUES)
    else:
        del outer[path[-1]]
    try:
        READ[name](value)
    except FormatError:
        return
    CHECK[name].validate(value)


@pytest.mark.parametrize("name", DOCUMENTS)
@pytest.mark.parametrize("wrong", [None, "text", [], {}])
def test_what_is_not_a_document_is_not_valid(name: str, wrong: object) -> None:
    assert not CHECK[name].is_valid(wrong)
    assert not CHECK[name].is_valid({**WHOLE[name], "schema": wrong})
