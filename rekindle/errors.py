# SPDX-License-Identifier: Apache-2.0
"""Every error that a user can see.

An error class exists because its caller acts differently: each has an exit status of its own and says
whether `restore` may go down the ladder after it. They are turned into text and into an exit status
once, in `rekindle/__main__.py`; docs/errors.md is generated from this module.

    RekindleError
    ├── UsageError          the command line asks for something that makes no sense
    ├── CapabilityError     this node cannot do what is needed (root, CRIU, namespaces)   ladder goes down
    ├── MismatchError       the snapshot was made for another kind of node                ladder goes down
    ├── NotFoundError       there is no such image                                        ladder goes down
    ├── PortError           an address that is to be published is taken
    ├── SpaceError          a disk is full                                                ladder goes down
    ├── BusyError           another rekindle holds what is needed                         ladder goes down
    ├── FormatError         a record, manifest or CRIU image file is not what it should be
    ├── IntegrityError      bytes are not those that their digest names
    ├── TrustError          an image is not signed by anybody whom the policy accepts
    ├── WorkloadError       the server died                                               ladder goes down
    ├── NotReadyError       the server did not get ready in time                          ladder goes down
    ├── NotDumpableError    the server holds something that CRIU cannot dump
    ├── DumpError           CRIU failed to dump
    ├── RestoreError        CRIU failed to restore                                        ladder goes down
    ├── OracleError         the server gave another answer than it should                 ladder goes down
    ├── SecretError         what is to be packed holds a secret
    ├── CudaError           the CUDA driver fails at a process's state on GPUs            ladder goes down
    ├── RegistryError       a registry cannot be reached, or fails                        ladder goes down
    └── CredentialsError    a registry refuses who we are                                 ladder goes down
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar


class RekindleError(Exception):
    """What failed, why, and what to do about it.

    `cause` is the tool's or the system's own words, `hint` what a person can do, `log` where to read
    more and `command` the command to replay.
    """

    exit_status: ClassVar[int]
    code: ClassVar[str]
    descends: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        cause: str = "",
        hint: str = "",
        log: Path | None = None,
        command: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.hint = hint
        self.log = log
        self.command = tuple(command)

    def to_json(self) -> dict[str, str]:
        """Return the error as reports and other documents hold it."""
        return {"code": self.code, "message": self.message, "cause": self.cause, "hint": self.hint}


class UsageError(RekindleError):
    """The command line, or a file that it names, asks for something that makes no sense."""

    exit_status = 2
    code = "usage"


class CapabilityError(RekindleError):
    """This node cannot do what is needed: no root, no working CRIU, no namespaces. See `rekindle doctor`."""

    exit_status = 10
    code = "capability"
    descends = True


class MismatchError(RekindleError):
    """The snapshot was made for another kind of node: other processor, GPU, files or kernel."""

    exit_status = 11
    code = "mismatch"
    descends = True


class NotFoundError(RekindleError):
    """There is no image of that name in the store, the layout or the registry."""

    exit_status = 12
    code = "not-found"
    descends = True


class PortError(RekindleError):
    """The address that is to be published is taken or may not be bound."""

    exit_status = 13
    code = "port"


class SpaceError(RekindleError):
    """A disk is full. What was half-written has been removed."""

    exit_status = 14
    code = "space"
    descends = True


class BusyError(RekindleError):
    """Another rekindle holds what is needed, and did not give it back in time."""

    exit_status = 15
    code = "busy"
    descends = True


class FormatError(RekindleError):
    """A record, manifest, layer or CRIU image file is malformed, or of a version that is not known here."""

    exit_status = 20
    code = "format"


class IntegrityError(RekindleError):
    """Bytes are not those that their digest names. Nothing of them is used."""

    exit_status = 21
    code = "integrity"


class TrustError(RekindleError):
    """An image has no signature by a key or an identity that the policy accepts, or it is older than one that
    was seen. Nothing of it is used."""

    exit_status = 22
    code = "trust"


class WorkloadError(RekindleError):
    """The server died while rekindle was at work on it."""

    exit_status = 30
    code = "workload"
    descends = True


class NotReadyError(RekindleError):
    """The server did not get ready, or did not answer, in time."""

    exit_status = 31
    code = "not-ready"
    descends = True


class NotDumpableError(RekindleError):
    """The server holds something that CRIU cannot dump; each such thing is named with its remedy."""

    exit_status = 32
    code = "not-dumpable"


class DumpError(RekindleError):
    """CRIU failed to dump the server."""

    exit_status = 33
    code = "dump"


class RestoreError(RekindleError):
    """CRIU failed to restore the server."""

    exit_status = 34
    code = "restore"
    descends = True


class OracleError(RekindleError):
    """The server gave another answer than the one it must give."""

    exit_status = 35
    code = "oracle"
    descends = True


class SecretError(RekindleError):
    """What is to be packed holds a credential. It is named, and its value is not shown."""

    exit_status = 36
    code = "secret"


class CudaError(RekindleError):
    """The CUDA driver could not lock, checkpoint, restore or unlock what a process holds on GPUs."""

    exit_status = 37
    code = "cuda"
    descends = True
    number: int = 0  # the driver's own, a CUresult; 0 if it gave no answer


class RegistryError(RekindleError):
    """A registry cannot be reached, does not answer in time, or answers what it must not."""

    exit_status = 40
    code = "registry"
    descends = True


class CredentialsError(RekindleError):
    """A registry refuses the credentials that it was given, or there are none for it."""

    exit_status = 41
    code = "credentials"
    descends = True


class Interrupted(BaseException):
    """A signal asked us to end: no error, and not to be caught as one.

    The exit status is 128 + its number, after everything was cleaned up.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
