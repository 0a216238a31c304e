# SPDX-License-Identifier: Apache-2.0
"""The report of a command: its phases, reasons, bytes and the oracle's answer. See docs/format.md.

A Report measures and collects; it writes nothing. Its creator gets a line of text about each step (`tell`)
and writes the document (`to_json`). Phases and `unaccounted` add up to the wall time since the process
started.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Self

from msgspec import Struct, field

from rekindle.errors import Interrupted, RekindleError
from rekindle.fields import JSON
from rekindle.os_errors import from_os_error
from rekindle.proc import peak_rss_bytes, process_age

SCHEMA = "rekindle.report/1"


class Outcome(StrEnum):
    RESTORED = "restored"
    NEUTRAL = "neutral"
    CACHE = "cache"
    COLD = "cold"
    SAVED = "saved"
    STARTED = "started"
    FAILED = "failed"


class Rung(StrEnum):
    PROCESS = "process"
    NEUTRAL = "neutral"
    CACHE = "cache"
    COLD = "cold"


class Reason(Struct, frozen=True, kw_only=True):
    """A reason against a rung: a stable code, the field, and its values in the record and on this node.

    A hard reason forbids the rung; a soft one is only reported. `recorded` is "" if there is nothing to
    compare. `advice` says what a person can do about it. `by_policy` means that a policy made it hard or
    soft.
    """

    rung: Rung
    code: str
    field: str
    recorded: str
    here: str
    hard: bool
    advice: str = ""
    by_policy: bool = False

    def to_json(self) -> dict[str, JSON]:
        return {
            "rung": self.rung,
            "code": self.code,
            "field": self.field,
            "recorded": self.recorded,
            "here": self.here,
            "hard": self.hard,
            "advice": self.advice,
            "by_policy": self.by_policy,
        }

    def __str__(self) -> str:
        if not self.recorded:
            return f"{self.code}: {self.here}"
        return f"{self.code}: {self.field} was {self.recorded}, is {self.here}"


def _keep_silent(_: str) -> None:
    pass


class Phase(Struct, kw_only=True):
    """A step: when it began, by time.monotonic(), and how long it took."""

    name: str
    seconds: float
    began: float


class ImageName(Struct, frozen=True, kw_only=True):
    """The name that the user gave an image, and its digest; "" until that is known."""

    reference: str
    digest: str = ""

    def to_json(self) -> dict[str, JSON]:
        return {"reference": self.reference, **({"digest": self.digest} if self.digest else {})}


class ByteCounts(Struct, kw_only=True):
    """The numbers of bytes that a command moved; None where it does not apply.

    `dump` is the size of CRIU's dump, `device` that of what its processes held on GPUs, by NVML; `packed` is
    the size of a GPU kernel cache before compression; `written` went to this machine's disk.
    """

    dump: int | None = None
    device: int | None = None
    packed: int | None = None
    fetched: int | None = None
    sent: int | None = None
    reused: int | None = None
    written: int | None = None

    def to_json(self) -> dict[str, JSON]:
        found = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: value for name, value in found.items() if value is not None}


class OracleAnswer(Struct, frozen=True, kw_only=True):
    """The oracle's answer and the recorded one. `problem` says why there is no answer.

    `first_token_seconds` counts from the request.
    """

    expected: JSON
    got: JSON
    match: bool
    first_token_seconds: float | None = None
    problem: str = ""

    def to_json(self) -> dict[str, JSON]:
        found: dict[str, JSON] = {"expected": self.expected, "got": self.got, "match": self.match}
        if self.first_token_seconds is not None:
            found["first_token_seconds"] = round(self.first_token_seconds, 6)
        if self.problem:
            found["lack"] = self.problem
        return found


class MemoryMode(StrEnum):
    MAPPED = "mapped"
    COPIED = "copied"


class LazyUse(Struct, frozen=True, kw_only=True):
    """The bytes of a server's memory that were here at its first answer, and whether that was all."""

    fetched_bytes: int
    is_complete: bool

    def to_json(self) -> dict[str, JSON]:
        return {"fetched_bytes": self.fetched_bytes, "complete": self.is_complete}


class MemoryUse(Struct, frozen=True, kw_only=True):
    """The memory of a restored server at its first answer.

    `mode` is `mapped` (from memory files, shared by replicas) or `copied`; `reason` says why it was copied
    although mapping was requested. `own_bytes` belong to this replica alone; `file_bytes` are mapped files in
    memory, shared by all processes that map them.
    """

    mode: MemoryMode
    reason: str = ""
    own_bytes: int = 0
    file_bytes: int = 0

    def to_json(self) -> dict[str, JSON]:
        found: dict[str, JSON] = {
            "mode": self.mode,
            "own_bytes": self.own_bytes,
            "file_bytes": self.file_bytes,
        }
        return {**found, "reason": self.reason} if self.reason else found


class CacheUse(Struct, frozen=True, kw_only=True):
    """A start's use of the kernel cache: entries that it read, and those that it compiled.

    `used` of the image's `entries` were read; in `made` entries something was compiled, `made_files` with
    `made_bytes` in `made_seconds`. The lists name the first ones. `complete` says that no observation was
    lost. `loaded` and `compiled` are numbers of artefacts by the engine's own log.
    """

    verdict: str
    entries: int
    used: int
    used_entries: Sequence[str]
    made: int
    made_entries: Sequence[str]
    made_files: int
    made_bytes: int
    made_seconds: float
    complete: bool
    loaded: int
    loaded_seconds: float
    compiled: int
    compiled_seconds: float

    def to_json(self) -> dict[str, JSON]:
        return {
            "verdict": self.verdict,
            "entries": self.entries,
            "used": self.used,
            "used_entries": list(self.used_entries),
            "made": self.made,
            "made_entries": list(self.made_entries),
            "made_files": self.made_files,
            "made_bytes": self.made_bytes,
            "made_seconds": round(self.made_seconds, 3),
            "complete": self.complete,
            "log": {
                "loaded": self.loaded,
                "loaded_seconds": round(self.loaded_seconds, 3),
                "compiled": self.compiled,
                "compiled_seconds": round(self.compiled_seconds, 3),
            },
        }


class ReadAheadUse(Struct, frozen=True, kw_only=True):
    """The files that were read ahead of a server that started, whether it was in memory already or not.

    Not `complete`: the server was ready before, or memory was short.
    """

    files: int
    bytes: int
    seconds: float
    complete: bool

    def to_json(self) -> dict[str, JSON]:
        return {
            "files": self.files,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 6),
            "complete": self.complete,
        }


class Failure(Struct, frozen=True, kw_only=True):
    """Why a command failed: a stable code, and text. `cause`, `hint` and `server` may be None."""

    code: str
    message: str
    cause: str | None = None
    hint: str | None = None
    server: str | None = None

    @classmethod
    def of(cls, error: BaseException) -> Self:
        known = from_os_error(error) if isinstance(error, OSError) else error
        match known:
            case RekindleError():
                return cls(
                    code=known.code,
                    message=known.message,
                    cause=known.cause,
                    hint=known.hint,
                    server=known.server or None,
                )
            case Interrupted():
                return cls.by_signal(known.signum)
            case _:
                return cls(code="bug", message=repr(error))

    @classmethod
    def by_signal(cls, signum: int) -> Self:
        return cls(code="interrupted", message=f"ended by signal {signum}")

    def to_json(self) -> dict[str, JSON]:
        found = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: text for name, text in found.items() if text is not None}


class ServerAddress(Struct, frozen=True, kw_only=True):
    """An address that the server listens on, and the one on which clients reach it.

    `published` is None if they do not; `problem` says why, if it was to be published.
    """

    server: str
    published: str | None = None
    problem: str = ""

    @property
    def shown(self) -> str:
        """The published address, for people."""
        return str(self.published) + (f" for {self.server}" if self.published != self.server else "")

    def to_json(self) -> dict[str, JSON]:
        found: dict[str, JSON] = {"server": self.server, "published": self.published}
        return {**found, "problem": self.problem} if self.problem else found


class AttachmentResult(Struct, frozen=True, kw_only=True):
    """The result of copying an attachment of an image: `problem` says why it was not copied, "" if it was.

    `digest` is "" for a list of attachments that could not be read.
    """

    digest: str
    subject: str
    artifact_type: str = ""
    problem: str = ""

    def to_json(self) -> dict[str, JSON]:
        return {
            "digest": self.digest,
            "subject": self.subject,
            "artifact_type": self.artifact_type,
            "copied": not self.problem,
            "problem": self.problem,
        }


class Pause(Struct, kw_only=True):
    """The time for which the clients of a running server waited for a snapshot of it.

    `seconds` counts from the first request that was held back, `still_seconds` from when nothing was
    forwarded any more. `in_flight` is the number of requests that had not finished by then, and went on
    afterwards.
    """

    in_flight: int = 0
    seconds: float = 0.0
    still_seconds: float = 0.0
    _began: float = 0.0
    _still: float = 0.0

    def begin(self, began: float, in_flight: int) -> None:
        """Note when requests were held back, by time.monotonic(), and that nothing is forwarded now."""
        self.in_flight, self._began, self._still = in_flight, began, time.monotonic()

    def end(self) -> None:
        """Note that the server is reached again."""
        if self._began:
            now = time.monotonic()
            self.seconds, self.still_seconds = now - self._began, now - self._still

    def to_json(self) -> dict[str, JSON]:
        return {
            "in_flight": self.in_flight,
            "seconds": round(self.seconds, 6),
            "still_seconds": round(self.still_seconds, 6),
        }


class Report(Struct, kw_only=True):
    """A report, which a command fills while it runs. It calls `tell` with a line of text at each step."""

    verb: str
    asked: Rung = Rung.PROCESS
    outcome: Outcome = Outcome.FAILED
    tell: Callable[[str], None] = _keep_silent
    image: ImageName | None = None
    reasons: list[Reason] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    bytes: ByteCounts = field(default_factory=ByteCounts)
    oracle: OracleAnswer | None = None
    memory: MemoryUse | None = None
    lazy: LazyUse | None = None
    cache: CacheUse | None = None
    read_ahead: ReadAheadUse | None = None
    first_token_seconds: float | None = None
    endpoint: str | None = None
    addresses: list[ServerAddress] = field(default_factory=list)
    pid: int | None = None
    replica: str | None = None
    pause: Pause | None = None
    error: Failure | None = None
    trusted_by: str | None = None
    allowed_secrets: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    attachments: Sequence[AttachmentResult] | None = None
    began: float = field(default_factory=lambda: time.monotonic() - process_age())

    def __post_init__(self) -> None:
        self.phases.append(Phase(name="start", seconds=time.monotonic() - self.began, began=self.began))

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a step. Phases do not nest."""
        begin = time.monotonic()
        phase = Phase(name=name, seconds=0.0, began=begin)
        self.phases.append(phase)
        try:
            yield
        finally:
            phase.seconds = time.monotonic() - begin
        self.say(f"{name} {phase.seconds:.2f} s")

    def split_phase(self, name: str, *, at: float) -> None:
        """Split the last phase at a time.monotonic(): the part from `at` on becomes the phase `name`."""
        last = self.phases[-1]
        rest = min(last.seconds, max(0.0, time.monotonic() - at))
        last.seconds -= rest
        self.phases.append(Phase(name=name, seconds=rest, began=last.began + last.seconds))

    def say(self, text: str) -> None:
        """Report a line of text about the present step."""
        self.tell(text)

    def say_bug(self, error: BaseException) -> None:
        """Report where a bug is, which does not end the command."""
        import traceback  # takes 4 ms

        self.say("".join(traceback.format_exception(error)))

    def fail(self, error: BaseException) -> None:
        """Record the error that ended the command."""
        self.error = Failure.of(error)

    def to_json(self) -> dict[str, JSON]:
        """Return the document that docs/format.md describes."""
        seconds = time.monotonic() - self.began
        return {
            "schema": SCHEMA,
            "verb": self.verb,
            "outcome": self.outcome,
            "asked": self.asked,
            "image": self.image.to_json() if self.image else {},
            "trust": {"verified": self.trusted_by is not None, "by": self.trusted_by},
            "reasons": [reason.to_json() for reason in self.reasons],
            "phases": [self._phase_to_json(phase) for phase in self.phases],
            "seconds": round(seconds, 6),
            "unaccounted_seconds": round(seconds - sum(p.seconds for p in self.phases), 6),
            "first_token_seconds": self.first_token_seconds and round(self.first_token_seconds, 6),
            "bytes": self.bytes.to_json(),
            "oracle": self.oracle.to_json() if self.oracle else {},
            "cache": self.cache.to_json() if self.cache else None,
            "endpoint": self.endpoint,
            "pid": self.pid,
            "addresses": [address.to_json() for address in self.addresses],
            "replica": self.replica,
            "pause": self.pause.to_json() if self.pause else None,
            "memory": self.memory.to_json() if self.memory else None,
            "lazy": self.lazy.to_json() if self.lazy else None,
            "read_ahead": self.read_ahead.to_json() if self.read_ahead else None,
            "peak_rss_bytes": peak_rss_bytes(),
            "allowed_secrets": self.allowed_secrets,
            "closed": self.closed,
            "attachments": self.attachments and [each.to_json() for each in self.attachments],
            "error": self.error.to_json() if self.error else None,
        }

    def _phase_to_json(self, phase: Phase) -> dict[str, JSON]:
        at = max(0.0, phase.began - self.began)
        return {"name": phase.name, "seconds": round(phase.seconds, 6), "at_seconds": round(at, 6)}
