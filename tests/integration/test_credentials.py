# SPDX-License-Identifier: Apache-2.0
"""A restored server may do no more than a start here would, and what it may not do is told."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import SERVERS, Rekindle, Replica, free_port, workhorse_flags

pytestmark = pytest.mark.criu
Restore = Callable[..., Replica]
NO_SETUID_FIXUP = 4


def groups(*numbers: int) -> list[str]:
    return ["setpriv", f"--groups={','.join(map(str, numbers))}"]


NONE = ["setpriv", "--clear-groups"]
WITHOUT_CAPABILITIES = ["setpriv", "--bounding-set=-setgid,-dac_override"]


class Saved:
    """A setter, saved by a rekindle with some credentials, behind a command that may change them."""

    def __init__(self, rekindle: Rekindle, prefix: list[str], command: list[str] | None = None) -> None:
        self.rekindle, self.port = rekindle, free_port()
        server = [*(command or []), sys.executable, str(SERVERS / "setter.py"), str(self.port)]
        flags = ["--ready-url", f"http://127.0.0.1:{self.port}/", *workhorse_flags(self.port)[2:]]
        done = self._here(prefix, "snapshot", "app", "--no-prove", "--no-cache", *flags, "--", *server)
        assert done.status == 0, done.stderr

    def _here(self, prefix: list[str], *words: str) -> Any:
        self.rekindle.prefix = prefix
        try:
            return self.rekindle(*words)
        finally:
            self.rekindle.prefix = []

    def match(self, *prefix: str) -> dict[str, tuple[str, bool]]:
        """The code of each difference by its field, where rekindle is started by a prefix."""
        done = self._here(list(prefix), "match", "app", "--json")
        assert done.status in {0, 3}, done.stderr
        return differences(done.json["steps"][0]["reasons"])


def differences(reasons: list[dict[str, Any]]) -> dict[str, tuple[str, bool]]:
    return {each["field"]: (each["code"], each["hard"]) for each in reasons if each["code"] != "not-proved"}


def test_a_group_that_a_start_here_would_not_have_forbids_the_process(rekindle: Rekindle) -> None:
    saved = Saved(rekindle, groups(4242, 4243), WITHOUT_CAPABILITIES)
    assert saved.match(*groups(4243)) == {"groups": ("more-privileged", True)}
    assert saved.match(*groups(4242, 4243)) == {}


def test_a_primary_group_that_a_start_here_would_not_have_forbids_the_process(rekindle: Rekindle) -> None:
    saved = Saved(rekindle, ["setpriv", "--regid=4343", "--clear-groups"], WITHOUT_CAPABILITIES)
    assert saved.match(*NONE) == {"group": ("more-privileged", True)}
    assert saved.match(*groups(4343)) == {"group": ("other-credentials", False)}


def test_a_group_is_told_where_the_server_could_give_it_to_itself(rekindle: Rekindle) -> None:
    saved = Saved(rekindle, groups(4242))
    assert saved.match(*NONE) == {"groups": ("other-credentials", False)}


def test_groups_that_the_command_sets_itself_are_no_difference(rekindle: Rekindle, restore: Restore) -> None:
    saved = Saved(rekindle, groups(4242), ["setpriv", "--groups=4343", *WITHOUT_CAPABILITIES])
    assert saved.match(*groups(4444)) == {}
    replica = restore("app", saved.port)
    assert json.loads(replica.ask("/settings"))["credentials"]["groups"] == [4343]


def test_a_server_that_has_given_up_its_groups_does_not_get_those_of_today(
    rekindle: Rekindle, restore: Restore
) -> None:
    saved = Saved(rekindle, groups(4242), ["setpriv", "--clear-groups", *WITHOUT_CAPABILITIES])
    rekindle.prefix = groups(4444)
    replica = restore("app", saved.port)
    assert differences(replica.report["reasons"]) == {}
    assert json.loads(replica.ask("/settings"))["credentials"]["groups"] == []


def test_a_group_of_today_that_the_process_lacks_is_told(rekindle: Rekindle, restore: Restore) -> None:
    saved = Saved(rekindle, NONE, WITHOUT_CAPABILITIES)
    assert saved.match(*groups(4242)) == {"groups": ("other-credentials", False)}
    rekindle.prefix = groups(4242)
    replica = restore("app", saved.port)
    assert json.loads(replica.ask("/settings"))["credentials"]["groups"] == []
    assert differences(replica.report["reasons"]) == {"groups": ("other-credentials", False)}


def test_no_new_privs_of_today_holds(rekindle: Rekindle, restore: Restore) -> None:
    """The OS kernel sees to that: it is inherited, and cannot be taken off."""
    saved = Saved(rekindle, [])
    rekindle.prefix = ["setpriv", "--no-new-privs"]
    replica = restore("app", saved.port)
    assert differences(replica.report["reasons"]) == {}
    assert json.loads(replica.ask("/settings"))["credentials"]["no_new_privs"] == 1


def test_no_new_privs_of_the_snapshot_is_told(rekindle: Rekindle, restore: Restore) -> None:
    saved = Saved(rekindle, ["setpriv", "--no-new-privs"])
    assert saved.match() == {"no_new_privs": ("other-credentials", False)}
    assert saved.match("setpriv", "--no-new-privs") == {}
    replica = restore("app", saved.port)
    assert json.loads(replica.ask("/settings"))["credentials"]["no_new_privs"] == 1


def test_securebits_of_today_that_the_process_lacks_forbid_it(rekindle: Rekindle) -> None:
    saved = Saved(rekindle, [])
    assert saved.match("setpriv", "--securebits=+no_setuid_fixup") == {
        "securebits": ("more-privileged", True)
    }


def test_securebits_of_the_snapshot_are_told(rekindle: Rekindle, restore: Restore) -> None:
    saved = Saved(rekindle, ["setpriv", "--securebits=+no_setuid_fixup"])
    assert saved.match() == {"securebits": ("other-credentials", False)}
    replica = restore("app", saved.port)
    assert json.loads(replica.ask("/settings"))["credentials"]["securebits"] == NO_SETUID_FIXUP


def test_ambient_capabilities_that_a_start_here_would_not_have_forbid_the_process(rekindle: Rekindle) -> None:
    ambient = ["setpriv", "--inh-caps=+chown", "--ambient-caps=+chown"]
    saved = Saved(rekindle, ambient)
    assert saved.match() == {"ambient capabilities": ("more-privileged", True)}
    assert saved.match(*ambient) == {}


def test_ambient_capabilities_of_today_are_told(rekindle: Rekindle, restore: Restore) -> None:
    saved = Saved(rekindle, [])
    today = ["setpriv", "--inh-caps=+chown", "--ambient-caps=+chown"]
    assert saved.match(*today) == {"ambient capabilities": ("other-credentials", False)}
    rekindle.prefix = today
    replica = restore("app", saved.port)
    assert json.loads(replica.ask("/settings"))["credentials"]["ambient"] == 0


def test_a_start_takes_its_place(rekindle: Rekindle, restore: Restore) -> None:
    saved = Saved(rekindle, groups(4242), WITHOUT_CAPABILITIES)
    rekindle.prefix = NONE
    replica = restore("app", saved.port)
    assert replica.report["outcome"] == "cold"
    assert json.loads(replica.ask("/settings"))["credentials"]["groups"] == []
