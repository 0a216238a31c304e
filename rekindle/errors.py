# SPDX-License-Identifier: Apache-2.0
"""Every error that a user can see.

An error class exists because callers act differently on it: each has its own exit status and says whether
`restore` may fall back to a lower rung. Errors become text and an exit status in one place,
`rekindle/__main__.py`; docs/errors.md is generated from this module.

    RekindleError
    ├── UsageError          the command line or a file that it names is invalid
    ├── CapabilityError     this node cannot do what is needed (root, CRIU, namespaces)   fallback
    ├── MismatchError       the snapshot was made for another kind of node                fallback
    ├── NotFoundError       there is no such image                                        fallback
    ├── PortError           the address to publish is in use
    ├── SpaceError          a disk is full                                                fallback
    ├── BusyError           another rekindle holds a lock                                 fallback
    ├── FormatError         a record, manifest, layer or CRIU image file is malformed
    ├── IntegrityError      bytes do not match their digest
    ├── TrustError          the policy does not accept an image's signatures
    ├── WorkloadError       the server died                                               fallback
    ├── NotReadyError       the server was not ready in time                              fallback
    ├── NotDumpableError    the server holds something that CRIU cannot dump
    ├── DumpError           CRIU failed to dump
    ├── RestoreError        CRIU failed to restore                                        fallback
    ├── OracleError         the server gave a wrong answer                                fallback
    ├── SecretError         the files to pack contain a credential
    ├── CudaError           the CUDA driver failed to move a process's state on GPUs      fallback
    ├── RegistryError       a registry is unreachable or fails                            fallback
    └── CredentialsError    a registry rejects our credentials                            fallback
"""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar


class RekindleError(Exception):
    """Base class of the errors.

    `message` says what failed, `cause` why, in the words of the tool or system, and `hint` what to do about
    it. `log` is a file with details, and `command` the command to replay. `server` says what became of the
    server, where the failure leaves that open.
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
        self.server = ""

    @property
    def summary(self) -> str:
        """Return the message and its cause in one line."""
        return ": ".join(part for part in (self.message, self.cause) if part)

    def to_json(self) -> dict[str, str]:
        """Return the error in the form of reports and other documents."""
        found = {"code": self.code, "message": self.message, "cause": self.cause, "hint": self.hint}
        return {**found, "server": self.server} if self.server else found


class UsageError(RekindleError):
    """The command line, or a file that it names, is invalid."""

    exit_status = 2
    code = "usage"


class CapabilityError(RekindleError):
    """This node cannot do what is needed: no root, no working CRIU, no namespaces. See `rekindle doctor`."""

    exit_status = 10
    code = "capability"
    descends = True


class MismatchError(RekindleError):
    """The snapshot was made for another kind of node: another processor, GPU, OS kernel or files."""

    exit_status = 11
    code = "mismatch"
    descends = True


class NotFoundError(RekindleError):
    """There is no image of that name in the store, the layout or the registry."""

    exit_status = 12
    code = "not-found"
    descends = True


class PortError(RekindleError):
    """The address to publish is in use or may not be bound."""

    exit_status = 13
    code = "port"


class SpaceError(RekindleError):
    """A disk is full. Half-written files have been removed."""

    exit_status = 14
    code = "space"
    descends = True


class BusyError(RekindleError):
    """Another rekindle holds a lock and did not release it in time."""

    exit_status = 15
    code = "busy"
    descends = True


class FormatError(RekindleError):
    """A record, manifest, layer or CRIU image file is malformed or has an unknown version."""

    exit_status = 20
    code = "format"


class IntegrityError(RekindleError):
    """Bytes do not match their digest. They are not used."""

    exit_status = 21
    code = "integrity"


class TrustError(RekindleError):
    """An image has no signature that the policy accepts, or is older than one seen before. It is not used."""

    exit_status = 22
    code = "trust"


class WorkloadError(RekindleError):
    """The server died while rekindle was working on it."""

    exit_status = 30
    code = "workload"
    descends = True


class NotReadyError(RekindleError):
    """The server was not ready, or did not answer, in time."""

    exit_status = 31
    code = "not-ready"
    descends = True


class NotDumpableError(RekindleError):
    """The server holds something that CRIU cannot dump. Each such thing is listed with its remedy."""

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
    """The server gave a wrong answer."""

    exit_status = 35
    code = "oracle"
    descends = True


class SecretError(RekindleError):
    """The files to pack contain a credential. It is named, and its value is not shown."""

    exit_status = 36
    code = "secret"


class CudaError(RekindleError):
    """The CUDA driver could not lock, checkpoint, restore or unlock a process's state on GPUs."""

    exit_status = 37
    code = "cuda"
    descends = True
    number: int = 0  # the driver's CUresult; 0 if it did not answer


class RegistryError(RekindleError):
    """A registry is unreachable, does not answer in time, or gives an invalid answer."""

    exit_status = 40
    code = "registry"
    descends = True


class CredentialsError(RekindleError):
    """A registry rejects our credentials, or there are none for it."""

    exit_status = 41
    code = "credentials"
    descends = True


class Interrupted(BaseException):
    """A signal asked us to end. It is not an Exception, so that no handler of errors catches it.

    The exit status is 128 + the signal's number, after the clean-up.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum
