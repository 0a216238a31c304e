# SPDX-License-Identifier: Apache-2.0
"""What a restored process may do beyond a start here forbids it, and what it may not is told."""

import os

import pytest
from msgspec import structs

from rekindle.cell.settings import Groups, ProcessSettings
from rekindle.node import credentials
from rekindle.node.credentials import InheritedCredentials as Given
from restore.decide.match_credentials import compare
from tests.samples.record import RECORD

MORE, OTHER = "more-privileged", "other-credentials"


def compared(
    was: Given | None, now: Given | None, *groups: Groups, known: bool = True
) -> list[tuple[str, str]]:
    settings = [ProcessSettings(pid=3 + number, groups=each) for number, each in enumerate(groups)]
    process = structs.replace(RECORD.process, settings=tuple(settings) if known else None)
    record = structs.replace(RECORD, process=process, node=structs.replace(RECORD.node, credentials=was))
    here = structs.replace(RECORD.node, credentials=now)
    return [(each.code, each.field) for each in compare(record, here)]


@pytest.mark.parametrize(
    ("was", "now"),
    [(None, Given(groups=(1,))), (Given(groups=(1,)), None), (None, None)],
)
def test_what_is_unknown_is_not_compared(was: Given | None, now: Given | None) -> None:
    assert compared(was, now) == []


@pytest.mark.parametrize("label", ["", "unconfined", "kernel"])
def test_a_process_without_a_label_gets_that_of_today(label: str) -> None:
    assert compared(Given(label=label), Given(label="docker-default (enforce)")) == []


@pytest.mark.parametrize("here", ["", "unconfined", "crun (enforce)", "container_t:s0:c3,c4"])
def test_another_label_forbids_the_process(here: str) -> None:
    was = Given(label="container_t:s0:c1,c2")
    assert compared(was, Given(label=here)) == [("security-label", "security label")]
    assert compared(was, was) == []


def test_a_filter_of_the_snapshot_is_told() -> None:
    assert compared(Given(filtered=True), Given()) == [(OTHER, "seccomp")]
    assert compared(Given(), Given(filtered=True)) == [], "the OS kernel passes it on"


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        ([Groups.OWN, Groups.OWN], None),
        ([Groups.OWN, Groups.INHERITED], OTHER),
        ([Groups.INHERITED, Groups.BOUND], MORE),
    ],
)
def test_groups_matter_for_processes_that_have_inherited_them(groups: list[Groups], code: str | None) -> None:
    found = compared(Given(groups=(5,)), Given(), *groups)
    assert found == ([(code, "groups")] if code else [])


def test_groups_matter_if_it_is_unknown_whose_they_are() -> None:
    assert compared(Given(groups=(5,)), Given(), known=False) == [(MORE, "groups")]


def test_bits_in_both_directions() -> None:
    some, others = (
        Given(securebits=1, ambient=1),
        Given(securebits=2, ambient=2),
    )
    assert compared(some, others) == [
        (MORE, "ambient capabilities"),
        (OTHER, "ambient capabilities"),
        (MORE, "securebits"),
    ]


def test_our_own_are_those_that_the_os_kernel_tells() -> None:
    own = credentials.own()
    assert (own.gid, own.groups) == (os.getegid(), tuple(sorted(os.getgroups())))
    assert credentials.inherited_from(os.getpid()) == own
