# SPDX-License-Identifier: Apache-2.0
"""Compare the limits and CPUs of a snapshot's process with those of this node.

Pure. restore/decide/rules.py defines what each difference means.
"""

import re
from collections.abc import Iterator

from rekindle.cell.settings import ProcessSettings
from rekindle.node import cpus
from rekindle.node.fingerprint import Fingerprint
from rekindle.node.limits import UNLIMITED, is_within
from rekindle.record import Record
from restore.decide.difference import Difference

_CAP_IPC_LOCK, _CAP_SYS_RESOURCE = 1 << 14, 1 << 24
_WORDS = {"nofile": "open files", "memlock": "locked memory", "as": "address space"}


def compare(record: Record, here: Fingerprint) -> Iterator[Difference]:
    """Yield the differences in what this node allows the server."""
    yield from _cpus(record, here)
    yield from lost_settings(record, here)
    for process in record.process.settings or ():
        yield from _changed_limits(process, here)
        yield from _used(process, here)


def lost_settings(record: Record, here: Fingerprint) -> Iterator[Difference]:
    """Yield what the server has set and no restore can set again, if it makes a difference on a node."""
    for process in record.process.settings or ():
        if not _names_all_nodes(process.memory_policy, here.memory_nodes):
            field = _name("NUMA policy", process)
            yield Difference("memory-policy", field, process.memory_policy, "that of rekindle")


def _names_all_nodes(policies: str, nodes: str) -> bool:
    """Tell whether each policy (`bind:0 interleave:0-1`) names all NUMA nodes, so that it forbids nothing."""
    named = [policy.rpartition(":")[2] for policy in policies.split()]
    return not named or (bool(nodes) and all(cpus.mask(nodes) & ~_mask(each) == 0 for each in named))


def _mask(text: str) -> int:
    """Return a bit for each node of a text; 0 for what names no nodes, such as `prefer`."""
    return cpus.mask(text) if re.fullmatch(r"[0-9]{1,4}([-,][0-9]{1,4})*", text) else 0


def _cpus(record: Record, here: Fingerprint) -> Iterator[Difference]:
    recorded = record.node
    if not (recorded.cpus and here.cpus):
        return
    was, now = cpus.mask(recorded.cpus), cpus.mask(here.cpus)
    if was.bit_count() != now.bit_count():
        shown = [f"{each.bit_count()} ({cpus.as_text(each)})" for each in (was, now)]
        yield Difference("cpu-count", "CPUs", *shown)
    if recorded.cpu_quota != here.cpu_quota:
        yield Difference("cpu-quota", "CPU quota", _quota(recorded), _quota(here))
    bound = 0
    for process in record.process.settings or ():
        for thread in process.threads:
            bound |= cpus.mask(thread.cpus)
    if bound & ~now:
        yield Difference("cpu-affinity", "CPUs of bound threads", cpus.as_text(bound), here.cpus)


def _quota(node: Fingerprint) -> str:
    return f"{node.cpu_quota:g} CPUs" if node.cpu_quota else "none"


def _changed_limits(process: ProcessSettings, here: Fingerprint) -> Iterator[Difference]:
    """Yield the limits that the server had changed, and could not change here."""
    for name, (soft, hard) in process.limits.items():
        if name not in here.limits:
            continue
        most = here.limits[name][1]
        field = _name(f"limit of {_WORDS.get(name, name)}", process)
        if hard is not None and not is_within(hard, most) and not here.capabilities & _CAP_SYS_RESOURCE:
            yield Difference("limit", field, f"set to {_shown(hard)}", f"at most {_shown(most)}")
        elif hard is None and soft is not None and not is_within(soft, most):
            yield Difference("limit", field, f"set to {_shown(soft)}", f"at most {_shown(most)}")


def _used(process: ProcessSettings, here: Fingerprint) -> Iterator[Difference]:
    """Yield the limits of this node that are below what the server uses."""
    used = {
        "nofile": process.open_files,
        "as": process.address_bytes,
        "memlock": 0 if here.capabilities & _CAP_IPC_LOCK else process.locked_bytes,
    }
    for name, amount in used.items():
        limit = _effective(process, here, name)
        if not is_within(amount, limit):
            field = _name(_WORDS[name], process)
            yield Difference("limit", field, f"up to {amount:,}", f"at most {limit:,}")


def _effective(process: ProcessSettings, here: Fingerprint, name: str) -> int:
    """Return the soft limit that the process will have."""
    soft, hard = here.limits.get(name, (UNLIMITED, UNLIMITED))
    own_soft, own_hard = process.limits.get(name, (None, None))
    soft, hard = soft if own_soft is None else own_soft, hard if own_hard is None else own_hard
    return soft if is_within(soft, hard) else hard


def _name(what: str, process: ProcessSettings) -> str:
    return f"{what} of process {process.pid}"


def _shown(limit: int) -> str:
    return "unlimited" if limit == UNLIMITED else f"{limit:,}"
