# SPDX-License-Identifier: Apache-2.0
"""Compare the credentials that a snapshot's process keeps with those of a start here.

Pure. restore/decide/rules.py defines what each difference means.
"""

from collections.abc import Collection, Iterator

from rekindle.cell.settings import Groups
from rekindle.node.credentials import InheritedCredentials
from rekindle.node.fingerprint import Fingerprint
from rekindle.record import Record
from restore.decide.difference import Difference

_MORE, _OTHER = "more-privileged", "other-credentials"
_UNCONFINED = {"", "unconfined", "kernel"}


def compare(record: Record, here: Fingerprint) -> Iterator[Difference]:
    """Yield the differences in what the process may do, if they are recorded and known here."""
    was, now = record.node.credentials, here.credentials
    if was is None or now is None:
        return
    settings = record.process.settings
    if settings is None or any(each.groups is not Groups.OWN for each in settings):
        bound = settings is None or any(each.groups is Groups.BOUND for each in settings)
        yield from _groups(was, now, _MORE if bound else _OTHER)
    if more := was.ambient & ~now.ambient:
        yield Difference(_MORE, "ambient capabilities", f"{more:#x}", "not set")
    if less := now.ambient & ~was.ambient:
        yield Difference(_OTHER, "ambient capabilities", "not set", f"{less:#x}")
    if was.securebits != now.securebits:
        code = _MORE if now.securebits & ~was.securebits else _OTHER
        yield Difference(code, "securebits", f"{was.securebits:#x}", f"{now.securebits:#x}")
    if was.no_new_privs and not now.no_new_privs:
        yield Difference(_OTHER, "no_new_privs", "set", "not set")
    if was.filtered and not now.filtered:
        yield Difference(_OTHER, "seccomp", "filtered", "not filtered")
    if was.label != now.label and was.label not in _UNCONFINED:
        yield Difference("security-label", "security label", was.label, now.label or "none")


def _groups(was: InheritedCredentials, now: InheritedCredentials, more_code: str) -> Iterator[Difference]:
    """Yield differences in the groups; more than here are `more_code`."""
    if was.gid != now.gid:
        code = _OTHER if was.gid in {now.gid, *now.groups} else more_code
        yield Difference(code, "group", str(was.gid), str(now.gid))
    if more := {*was.groups} - {*now.groups, now.gid}:
        yield Difference(more_code, "groups", _listed(more), "not ours")
    if less := {*now.groups} - {*was.groups, was.gid}:
        yield Difference(_OTHER, "groups", "not those of the process", _listed(less))


def _listed(groups: Collection[int]) -> str:
    return " ".join(map(str, sorted(groups)[:20]))
