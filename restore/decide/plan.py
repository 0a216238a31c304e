# SPDX-License-Identifier: Apache-2.0
"""Plan a restore: the rungs in order, the reasons against each, what it fetches and how long it takes.

Pure and total: the same facts give the same plan, and every set of facts gives one.
"""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from msgspec import Struct, field, structs

from rekindle.errors import CapabilityError, MismatchError
from rekindle.node.fingerprint import Fingerprint
from rekindle.report import Reason, Rung
from rekindle.secrets import HIDDEN
from restore.decide import match_api_key, match_gpus, match_process
from restore.decide.abilities import Abilities
from restore.decide.difference import Difference
from restore.decide.match_api_key import ApiKeys
from restore.decide.match_gpus import ANY_GPU, GpuChoice
from restore.decide.rules import Strictness, reason_for

if TYPE_CHECKING:
    from oci.cache.image import CacheImage
    from oci.image import Image
    from restore.decide.match_neutral import NeutralFacts

SCHEMA = "rekindle.plan/1"

# For estimates, at the slow end of the measurements. Deadlines are longer.
FETCH_BYTES_PER_SECOND = 100e6
UNPACK_BYTES_PER_SECOND = 500e6
_RESTORE_BYTES_PER_SECOND = 1.5e9
_RESTORE_SECONDS = 0.6
_DEADLINE_FACTOR = 5.0
_NEUTRAL_SHARE = 0.35  # of a start with warm caches
_DEADLINE_SECONDS = 15.0


class Facts(Struct, frozen=True, kw_only=True):
    """Everything that a plan depends on.

    `image` is None if it could not be read, for the reason `unreached`. `cache` is None if the image has no
    kernel cache, or if its config has not been read yet (`cache_unread`). `different` is the result of
    `match_loaded.mapped`, and `loaded` that of `match_loaded.compare`. `local`: nothing has to be fetched;
    `unpacked`: the dump is ready on this node; `has_memory`: its memory files are, in another dump;
    `kept_layers`: the digests of its layers that are. `fetch_bytes_per_second` is the speed of its registry,
    `unpack_bytes_per_second` that of the disk.
    `given` is the command that the user gave; None for the recorded one. `variables` are the differences of
    the environment; `enforced` are options of which the given command may have other values. `environment`
    is that of a start today, and `api_keys` are those of which it would require one. `gpu_choice` decides
    which GPUs take the places of the recorded ones.
    """

    node: Fingerprint
    abilities: Abilities
    image: "Image | None" = None
    unreached: Reason | None = None
    cache: "CacheImage | None" = None
    cache_unread: bool = False
    neutral: "NeutralFacts | None" = None
    neutral_unread: bool = False
    different: Mapping[str, str] = field(default_factory=dict)
    loaded: Sequence[Difference] = ()
    local: bool = False
    unpacked: bool = False
    has_memory: bool = False
    kept_layers: frozenset[str] = frozenset()
    fetch_bytes_per_second: float = FETCH_BYTES_PER_SECOND
    unpack_bytes_per_second: float = UNPACK_BYTES_PER_SECOND
    given: Sequence[str] | None = None
    variables: Sequence[Difference] = ()
    enforced: frozenset[str] = frozenset()
    environment: Mapping[str, str] = field(default_factory=dict)
    api_keys: ApiKeys = ApiKeys()
    gpu_choice: GpuChoice = ANY_GPU

    @property
    def command(self) -> Sequence[str] | None:
        """The command that a lower rung starts; None if there is none."""
        if self.given:
            return self.given
        recorded = self.image.record.command if self.image else ()
        return recorded if recorded and not any(HIDDEN in word for word in recorded) else None


class Step(Struct, frozen=True, kw_only=True):
    """One rung of a plan.

    It is possible if no reason is hard. `seconds` is an estimate of the time until the server answers;
    None if it is unknown. `deadline_seconds` limits the time until the process answers, or the kernel cache
    is in place; `limited_seconds` is an estimate of that time, 0.0 if nothing has to be fetched or unpacked.
    `unpack_bytes` is the size of the dump to unpack. `roots` are the names of the roots of the kernel cache
    that it needs.
    """

    rung: Rung
    reasons: Sequence[Reason]
    fetch_bytes: int = 0
    seconds: float | None = None
    deadline_seconds: float | None = None
    limited_seconds: float = 0.0
    unpack_bytes: int = 0
    roots: Sequence[str] = ()

    @property
    def possible(self) -> bool:
        """True if no reason is hard."""
        return not any(reason.hard for reason in self.reasons)

    def to_json(self) -> dict[str, Any]:
        return {
            "rung": self.rung,
            "possible": self.possible,
            "fetch_bytes": self.fetch_bytes,
            "expected_seconds": self.seconds and round(self.seconds, 1),
            "deadline_seconds": self.deadline_seconds and round(self.deadline_seconds, 1),
            "reasons": [reason.to_json() for reason in self.reasons],
        }


class Plan(Struct, frozen=True, kw_only=True):
    """The rungs from the requested one down to the cold start, in the order to try them."""

    asked: Rung
    steps: Sequence[Step]
    device_map: Mapping[str, str]

    @property
    def first(self) -> Step | None:
        """The highest possible step; None if there is none."""
        return next((step for step in self.steps if step.possible), None)

    @property
    def reasons(self) -> list[Reason]:
        return [reason for step in self.steps for reason in step.reasons]

    def to_json(self) -> dict[str, Any]:
        first = self.first
        return {
            "asked": self.asked,
            "rung": first.rung if first else None,
            "device_map": dict(self.device_map),
            "steps": [step.to_json() for step in self.steps],
        }


def make(
    facts: Facts,
    asked: Rung = Rung.PROCESS,
    strictness: Strictness | None = None,
    *,
    deadlines: Mapping[Rung, float | None] = MappingProxyType({}),
    require: Rung = Rung.COLD,
) -> Plan:
    """Return the plan for a restore whose first rung is `asked`.

    `deadlines` are those that the user gave. Rungs below `require` are not taken.
    """
    rungs = list(Rung)
    strictness = strictness or Strictness()
    steps: Mapping[Rung, Callable[[Facts], Step]] = {
        Rung.PROCESS: _process,
        Rung.NEUTRAL: _neutral,
        Rung.CACHE: functools.partial(_cache, soft=strictness.soft),
        Rung.COLD: _cold,
    }
    made = []
    for rung in rungs[rungs.index(asked) :]:
        if rung is Rung.NEUTRAL and asked is not rung and not (facts.image and facts.image.neutral):
            continue  # images made before, and of servers that cannot have one
        step = steps[rung](facts)
        deadline = deadlines.get(rung) or step.deadline_seconds
        reasons = [strictness.apply(reason) for reason in step.reasons]
        made.append(structs.replace(step, reasons=reasons, deadline_seconds=deadline))
    for number, step in enumerate(made):
        lower = [each for each in made[number + 1 :] if rungs.index(each.rung) <= rungs.index(require)]
        if any(each.possible for each in lower) and (late := _expected_late(step)):
            made[number] = structs.replace(step, reasons=[*step.reasons, strictness.apply(late)])
    places = {}
    if facts.image:
        places = match_gpus.device_map(facts.image.record, facts.node, facts.gpu_choice)
    return Plan(asked=asked, steps=made, device_map=places)


def _process(facts: Facts) -> Step:
    if facts.image is None:
        return Step(rung=Rung.PROCESS, reasons=_unreached(facts, Rung.PROCESS))
    record = facts.image.record
    different = dict(facts.different)
    roots: list[str] = []
    fetched = 0
    if facts.cache is not None:
        inventory = facts.cache.inventory
        from rekindle.engine.caches import is_within
        from restore.decide import match_cache

        roots = match_cache.roots_with_missing(record.mapped_files, different, inventory)
        for root in inventory.roots:
            if root.name in roots:
                fetched += facts.cache.layers[root.layer].size
                for file in record.mapped_files:
                    if different.get(file.path) == "missing" and is_within(file.path, root.recorded):
                        del different[file.path]
    written = 0
    if not facts.unpacked:
        layers = [layer for layer in facts.image.layers if not (facts.has_memory and layer.is_memory)]
        fetched += sum(layer.size for layer in layers if str(layer.digest) not in facts.kept_layers)
        written = record.dump.stored_bytes
        written -= sum(each.data_bytes for each in record.dump.memory) if facts.has_memory else 0
    fetched = 0 if facts.local else fetched
    seconds = (
        _RESTORE_SECONDS
        + record.dump.stored_bytes / _RESTORE_BYTES_PER_SECOND
        + max(fetched / facts.fetch_bytes_per_second, written / facts.unpack_bytes_per_second)
    )
    found = match_process.compare(
        record,
        facts.node,
        facts.abilities,
        different,
        facts.given,
        facts.loaded,
        facts.environment,
        facts.enforced,
        facts.gpu_choice,
    )
    keys = match_api_key.compare(record, facts.api_keys)
    return Step(
        rung=Rung.PROCESS,
        reasons=[reason_for(each) for each in (*found, *facts.variables, *keys)],
        fetch_bytes=fetched,
        seconds=seconds,
        deadline_seconds=_deadline(seconds, record.start_seconds),
        limited_seconds=seconds if fetched or written else 0.0,
        unpack_bytes=written,
        roots=roots,
    )


def _neutral(facts: Facts) -> Step:
    rung = Rung.NEUTRAL
    if facts.image is None:
        return Step(rung=rung, reasons=_unreached(facts, rung))
    if facts.image.neutral is None:
        reason = reason_for(Difference("no-neutral", "neutral process", "", "the image holds none"))
        return Step(rung=rung, reasons=[reason])
    start = facts.image.record.start_seconds
    if facts.neutral_unread or facts.neutral is None:
        return Step(rung=rung, reasons=_no_command(facts, rung), deadline_seconds=_deadline(0.0, start))
    from restore.decide import match_neutral

    found = match_neutral.compare(
        facts.neutral, facts.node, facts.abilities, facts.command or (), facts.environment
    )
    reasons = [structs.replace(reason_for(each), rung=rung) for each in found]
    fetched = facts.neutral.fetch_bytes
    written = facts.neutral.record.dump.stored_bytes / facts.unpack_bytes_per_second
    seconds = _RESTORE_SECONDS + max(fetched / facts.fetch_bytes_per_second, written)
    return Step(
        rung=rung,
        reasons=[*reasons, *_no_command(facts, rung)],
        fetch_bytes=fetched,
        seconds=seconds + start * _NEUTRAL_SHARE if start else None,
        deadline_seconds=_deadline(seconds, start),
        limited_seconds=seconds if fetched else 0.0,
    )


def _cache(facts: Facts, soft: Collection[str]) -> Step:
    if facts.image is None:
        return Step(rung=Rung.CACHE, reasons=_unreached(facts, Rung.CACHE))
    record = facts.image.record
    if facts.cache_unread:
        reasons = _no_command(facts, Rung.CACHE)
        return Step(rung=Rung.CACHE, reasons=reasons, deadline_seconds=_deadline(0.0, record.start_seconds))
    if facts.cache is None:
        reason = reason_for(Difference("no-cache", "kernel cache", "", "the image holds no kernel cache"))
        return Step(rung=Rung.CACHE, reasons=[reason, *_no_command(facts, Rung.CACHE)])
    inventory = facts.cache.inventory
    from restore.decide import match_cache  # imported late: the process rung does not need it

    fit = match_cache.compare(inventory, record.node.architecture, record, facts.node, soft)
    chosen = [root for root in inventory.roots if root.name in fit.roots]
    fetched = 0 if facts.local else sum(facts.cache.layers[root.layer].size for root in chosen)
    written = sum(root.bytes for root in chosen)
    seconds = fetched / facts.fetch_bytes_per_second + written / UNPACK_BYTES_PER_SECOND
    return Step(
        rung=Rung.CACHE,
        reasons=[*fit.reasons, *_no_command(facts, Rung.CACHE)],
        fetch_bytes=fetched,
        seconds=seconds + record.start_seconds if record.start_seconds else None,
        deadline_seconds=_deadline(seconds, record.start_seconds),
        limited_seconds=seconds if fetched else 0.0,
        roots=[root.name for root in chosen],
    )


def _cold(facts: Facts) -> Step:
    known = facts.image.record.start_seconds if facts.image else 0.0
    return Step(rung=Rung.COLD, reasons=_no_command(facts, Rung.COLD), seconds=known or None)


def _no_command(facts: Facts, rung: Rung) -> list[Reason]:
    if facts.command:
        return []
    here = "a secret was removed from the recorded command" if facts.image else "no command is given"
    return [structs.replace(reason_for(Difference("no-command", "command", "", here)), rung=rung)]


def _unreached(facts: Facts, rung: Rung) -> list[Reason]:
    assert facts.unreached is not None
    return [structs.replace(facts.unreached, rung=rung)]


def _expected_late(step: Step) -> Reason | None:
    """Return the reason not to begin a rung: it is expected to pass its deadline."""
    if step.deadline_seconds is None or step.limited_seconds <= step.deadline_seconds:
        return None
    code = "cache-slow" if step.rung is Rung.CACHE else "slow"
    limit, expected = f"within {step.deadline_seconds:.0f} s", f"about {step.limited_seconds:.0f} s"
    return structs.replace(reason_for(Difference(code, "time", limit, expected)), rung=step.rung)


def _deadline(seconds: float, cold: float) -> float:
    """Return the seconds after which a rung is given up.

    That is a multiple of the estimate, but no longer than the cold start that the rung replaces, if the
    duration of that is known (`cold` is not 0.0).
    """
    generous = max(_DEADLINE_SECONDS, seconds * _DEADLINE_FACTOR)
    return min(generous, max(_DEADLINE_SECONDS, cold)) if cold else generous


_SHOWN = 12
_CAPABILITIES = {"privileges", "criu", "criu-version", "cuda"}
_CANNOT = {
    Rung.PROCESS: "this node cannot restore the snapshot's process",
    Rung.NEUTRAL: "this node cannot restore the snapshot's neutral process",
    Rung.CACHE: "this node cannot use the snapshot's kernel cache",
    Rung.COLD: "no command to start",
}


def require_possible(reasons: Sequence[Reason]) -> None:
    """Raise CapabilityError or MismatchError if there is a hard reason."""
    hard = [reason for reason in reasons if reason.hard]
    if not hard:
        return
    shown = "\n".join(str(reason) for reason in hard[:_SHOWN])
    more = f"\nand {len(hard) - _SHOWN} more" if len(hard) > _SHOWN else ""
    kind = CapabilityError if hard[0].code in _CAPABILITIES else MismatchError
    raise kind(_CANNOT[hard[0].rung], cause=shown + more, hint=hard[0].advice)
