# SPDX-License-Identifier: Apache-2.0
"""A neutral process fits every node with the same files and processor features, whatever its GPUs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from oci.descriptor import Descriptor
from rekindle.criu import Criu
from rekindle.digest import Digest
from rekindle.environment import RecordedVariables
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.gpu import Gpus
from rekindle.record import Neutral, Record
from rekindle.report import Rung
from restore.decide.abilities import Abilities
from restore.decide.difference import Difference
from restore.decide.match_neutral import NeutralFacts, becomes, compare
from restore.decide.plan import Facts, make
from restore.decide.rules import Strictness
from tests.fakes.nodes import A100_MIG, H100, L4, MI300X
from tests.samples.record import NODE, RECORD
from tests.unit.restore.decide.test_plan import image

ABLE = Abilities(criu=Criu(path=Path("/criu"), version="4.2.1"))
NEUTRAL = Rung.NEUTRAL


@pytest.fixture(name="script")
def _script(tmp_path: Path) -> Path:
    path = tmp_path / "serve"
    path.write_text("#!/usr/bin/python3\n")
    path.chmod(0o755)
    return path


def recorded(script: Path, *variables: str) -> Record:
    return structs.replace(
        RECORD,
        node=structs.replace(NODE, devices=structs.replace(NODE.devices, gpus=())),
        variables=RecordedVariables(salt="00" * 16, marks={}, withheld=()),
        neutral=Neutral(script=str(script), variables=variables),
    )


def facts(script: Path, node: Fingerprint = NODE, command: Sequence[str] = (), **more: Any) -> Facts:
    neutral = Descriptor(media_type="x/y", digest=Digest("sha256:" + "0" * 64), size=1)
    found = NeutralFacts(record=recorded(script, "READ_AT_IMPORT"), **more)
    return Facts(
        node=node,
        abilities=ABLE,
        image=structs.replace(image(RECORD, 1000), neutral=neutral),
        neutral=found,
        given=list(command) or [str(script), "--port", "1"],
    )


def codes(found: Facts, strictness: Strictness | None = None) -> list[str]:
    (step,) = [each for each in make(found, strictness=strictness).steps if each.rung is NEUTRAL]
    assert all(reason.rung is NEUTRAL for reason in step.reasons)
    return [reason.code for reason in step.reasons if reason.hard]


@pytest.mark.parametrize("devices", [H100, L4, A100_MIG, MI300X, Gpus(), structs.replace(L4, driver="1.2")])
def test_other_gpus_and_drivers_do_not_matter(script: Path, devices: Gpus) -> None:
    assert codes(facts(script, structs.replace(NODE, devices=devices))) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"cpu_features": frozenset({"fpu"})}, "cpu-feature"),
        ({"architecture": "aarch64"}, "architecture"),
        ({"page_bytes": 65536}, "page-size"),
    ],
)
def test_other_processors_do(script: Path, changes: dict[str, Any], code: str) -> None:
    assert code in codes(facts(script, structs.replace(NODE, **changes)))


def test_files_must_be_the_same(script: Path) -> None:
    """Another C library is another file that is mapped."""
    assert codes(facts(script, different={"/usr/lib/libc.so.6": "missing"})) == ["rootfs-file"]
    loaded = [Difference("package", "torch", "2.13", "2.14")]
    assert codes(facts(script, loaded=loaded)) == ["package"]


@pytest.mark.parametrize("name", ["READ_AT_IMPORT", "PYTHONPATH", "OMP_NUM_THREADS", "LC_ALL", "LD_PRELOAD"])
def test_variables_that_imports_read_must_be_the_same(script: Path, name: str) -> None:
    variables = [Difference("environment-other", name, "1", "2")]
    assert codes(facts(script, variables=variables)) == ["neutral-variable"]
    assert codes(facts(script, variables=variables), Strictness(soft=frozenset({"neutral-variable"}))) == []


def test_other_variables_may_differ(script: Path) -> None:
    variables = [Difference("environment", "VLLM_READ_LATER", "1", "2")]
    assert codes(facts(script, variables=variables)) == []


def test_the_program_must_be_the_same_and_its_arguments_need_not(script: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("#!/usr/bin/python3\n")
    other.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(script)
    assert codes(facts(script, command=["env", "X=1", str(link), "anything"])) == []
    for command in ([str(other)], ["nice", "-n", "1", str(script)], ["sh", "-c", "a && b"], ["/missing"]):
        assert codes(facts(script, command=command)) == ["neutral-command"], command


def test_wrappers_give_it_their_variables_and_directory(script: Path) -> None:
    found = becomes(recorded(script), ["env", "X=1", str(script), "serve"], {"Y": "2"})
    assert found is not None
    assert found.argv == (str(script), "serve")
    assert found.environment == {"X": "1", "Y": "2"}


def test_an_image_without_one_has_no_such_rung_unless_it_is_asked_for(script: Path) -> None:
    without = structs.replace(facts(script), image=image(RECORD, 1000), neutral=None)
    assert NEUTRAL not in [step.rung for step in make(without).steps]
    asked = make(without, NEUTRAL).steps
    assert [step.rung for step in asked] == [NEUTRAL, Rung.CACHE, Rung.COLD]
    assert [reason.code for reason in asked[0].reasons] == ["no-neutral"]


def test_one_whose_record_was_not_read_is_possible_until_it_is(script: Path) -> None:
    unread = structs.replace(facts(script), neutral=None, neutral_unread=True)
    assert codes(unread) == []


def test_without_criu_it_cannot_be_restored(script: Path) -> None:
    found = structs.replace(facts(script), abilities=Abilities(problems={"criu": "there is none"}))
    assert codes(found) == ["criu"]


def test_compare_is_of_the_neutral_process_alone(script: Path) -> None:
    found = compare(NeutralFacts(record=recorded(script)), NODE, ABLE, [str(script)], {})
    assert [each.code for each in found if each.code != "not-proved"] == []
