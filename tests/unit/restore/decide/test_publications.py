# SPDX-License-Identifier: Apache-2.0
"""The addresses to publish: what `--publish` means, and what is published without it."""

import pytest
from msgspec import structs

from rekindle.cell import Network
from rekindle.engine import Endpoint
from rekindle.errors import UsageError
from rekindle.record import Record, RecordedEngine
from restore.decide.publications import Publication, moved, publications, unpublished
from tests.samples.record import RECORD

MAIN = RECORD.endpoint
GRPC, METRICS = Endpoint(host="0.0.0.0", port=8001), Endpoint(host="::", port=8002)
SEVERAL = structs.replace(RECORD, listeners=(MAIN, GRPC, METRICS))


def read(*asked: str, record: Record | None = SEVERAL, main: Endpoint | None = MAIN) -> list[str]:
    return [f"{each.at} {each.listens or 'main'}" for each in publications(asked, main, record)]


def test_by_default_every_port_is_where_it_was() -> None:
    assert read() == ["127.0.0.1:8000 main", "0.0.0.0:8001 0.0.0.0:8001", "[::]:8002 [::]:8002"]
    assert [each.required for each in publications((), MAIN, SEVERAL)] == [True, False, False]
    assert unpublished(publications((), MAIN, SEVERAL), SEVERAL) == []


def test_replicas_have_ports_of_their_own() -> None:
    three = publications((), MAIN, SEVERAL)
    taken = [each.at.port for index in range(4) for each in moved(three, index)]
    assert taken[:6] == [8000, 8001, 8002, 8003, 8004, 8005]
    assert len(set(taken)) == len(taken)
    assert [str(each.at) for each in moved(publications((), MAIN, RECORD), 2)] == ["127.0.0.1:8002"]
    assert moved(three, 0) == tuple(three)
    assert moved([], 5) == ()
    with pytest.raises(UsageError, match="there is no port 65536"):
        moved(publications(("65535",), MAIN, RECORD), 1)


def test_where_the_command_listens_holds_for_the_main_port() -> None:
    elsewhere = Endpoint(host="127.0.0.1", port=9000)
    assert read(main=elsewhere)[:2] == ["127.0.0.1:9000 main", "0.0.0.0:8001 0.0.0.0:8001"]


def test_what_an_older_record_does_not_tell_is_not_published() -> None:
    assert read(record=RECORD) == ["127.0.0.1:8000 main"]
    assert read("9001:8001", record=RECORD) == ["127.0.0.1:9001 127.0.0.1:8001"]


@pytest.mark.parametrize(("record", "main"), [(None, MAIN), (SEVERAL, MAIN)])
def test_one_port_alone_is_for_the_main_one(record: Record | None, main: Endpoint) -> None:
    assert read("8001", record=record, main=main) == ["127.0.0.1:8001 main"]
    assert read("[::1]:9000", record=record, main=main) == ["[::1]:9000 main"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (["9000:8001"], ["0.0.0.0:9000 0.0.0.0:8001"]),
        (["9000:8000"], ["127.0.0.1:9000 main"]),
        (["127.0.0.1:9000:8001"], ["127.0.0.1:9000 0.0.0.0:8001"]),
        (["[::1]:9000:8002"], ["[::1]:9000 [::]:8002"]),
        (["localhost:9000:8001"], ["localhost:9000 0.0.0.0:8001"]),
        (["8000", "8001"], ["127.0.0.1:8000 main", "0.0.0.0:8001 0.0.0.0:8001"]),
        (["127.0.0.1:8001", "9000"], ["127.0.0.1:8001 0.0.0.0:8001", "127.0.0.1:9000 main"]),
    ],
)
def test_a_port_of_the_server_may_be_named(asked: list[str], expected: list[str]) -> None:
    assert read(*asked) == expected


def test_what_is_not_named_is_not_published() -> None:
    assert unpublished(publications(["9000"], MAIN, SEVERAL), SEVERAL) == [GRPC, METRICS]
    assert unpublished(publications(["9000:8001"], MAIN, SEVERAL), SEVERAL) == [MAIN, METRICS]


@pytest.mark.parametrize(
    "asked", [[""], ["x"], ["0"], ["65536:8000"], ["9000:65536"], [":9000"], ["9000:"], ["[::1]"]]
)
def test_what_is_no_address_is_refused(asked: list[str]) -> None:
    with pytest.raises(UsageError):
        read(*asked)


@pytest.mark.parametrize("asked", [["9000:7000"], ["9000", "9000:8001", "127.0.0.1:9000"]])
def test_what_cannot_be_published_is_refused(asked: list[str]) -> None:
    with pytest.raises(UsageError):
        read(*asked)


def test_a_server_of_which_nothing_is_known_has_no_address() -> None:
    assert read(record=None, main=None) == []
    with pytest.raises(UsageError, match="unknown where"):
        read("9000", record=None, main=None)


def test_on_the_hosts_network_the_server_has_its_ports_itself() -> None:
    process = structs.replace(SEVERAL.process, network=Network.HOST)
    assert publications((), MAIN, structs.replace(SEVERAL, process=process)) == [Publication(at=MAIN)]


def test_further_ports_of_vllm_are_its_own() -> None:
    engine = RecordedEngine(name="vllm", options={})
    record = structs.replace(SEVERAL, engine=engine)
    assert read(record=record) == ["127.0.0.1:8000 main"]
    assert unpublished(publications((), MAIN, record), record) == []
    assert read("8000", "8001", record=record)[1] == "0.0.0.0:8001 0.0.0.0:8001"
