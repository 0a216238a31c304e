# SPDX-License-Identifier: Apache-2.0
"""Read what a process may do beside its capabilities, and hands down to those that it starts.

A restored process has what it had at its snapshot, except that the OS kernel adds what can only be added:
no_new_privs and filters of system calls, which it inherits from the process that restores it.
"""

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct, structs

_PR_GET_SECUREBITS = 27
_GROUPS_LIMIT = 1 << 16  # NGROUPS_MAX
_Id = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
_Bits = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]


class InheritedCredentials(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The credentials of a process that those which it starts inherit.

    `groups` are the supplementary ones. `permitted` and `ambient` have a bit for each such capability, as in
    capabilities(7), `securebits` are those of prctl(2). `label` is that of AppArmor or SELinux, "" for none.
    `filtered` says that a seccomp filter was inherited.
    """

    gid: _Id = 0
    groups: Annotated[tuple[_Id, ...], Meta(max_length=_GROUPS_LIMIT)] = ()
    permitted: _Bits = 0
    ambient: _Bits = 0
    no_new_privs: bool = False
    securebits: _Bits = 0
    label: Annotated[str, Meta(max_length=4096)] = ""
    filtered: bool = False

    @classmethod
    def of_process(cls, pid: int) -> "InheritedCredentials":
        """Read those of a process of this namespace, except its securebits. Raises OSError."""
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        status = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        label = b""
        with contextlib.suppress(OSError):  # without a security module, EINVAL
            label = Path(f"/proc/{pid}/attr/current").read_bytes()
        return cls(
            gid=int(status["Gid"][1]),
            groups=tuple(sorted(map(int, status["Groups"]))),
            permitted=int(status["CapPrm"][0], 16),
            ambient=int(status.get("CapAmb", ["0"])[0], 16),
            no_new_privs=status.get("NoNewPrivs") == ["1"],
            label=label.rstrip(b"\0\n").decode(errors="replace"),
            filtered=status.get("Seccomp", ["0"]) != ["0"],
        )


def own() -> InheritedCredentials:
    """Return our own credentials."""
    securebits = ctypes.CDLL(None).prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0)
    return structs.replace(InheritedCredentials.of_process(os.getpid()), securebits=max(0, securebits))


def inherited_from(pid: int) -> InheritedCredentials:
    """Return the credentials that a process, which we or our like have started, inherited. Raises OSError.

    A cell adds a filter of its own, and no file tells securebits: of these, ours count.
    """
    ours = own()
    found = InheritedCredentials.of_process(pid)
    return structs.replace(found, securebits=ours.securebits, filtered=ours.filtered)
