# SPDX-License-Identifier: Apache-2.0
"""Gather the facts for a plan: the image's record, this node, and the dumps that are unpacked here."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from oci import image as images
from oci.reference import LayoutReference, Reference
from oci.resolve import FoundImage
from oci.trust.policy import Policy
from oci.trust.verifier import Verified
from rekindle.engine.choose import from_record
from rekindle.errors import UsageError
from rekindle.home import Home
from rekindle.node import gpu, memory
from rekindle.node.fingerprint import Fingerprint
from restore import dumps
from restore.decide import (
    abilities,
    match_api_key,
    match_directories,
    match_environment,
    match_loaded,
    match_needs,
)
from restore.decide.abilities import Abilities
from restore.decide.match_gpus import GpuChoice
from restore.decide.match_neutral import NeutralFacts
from restore.decide.plan import FETCH_BYTES_PER_SECOND, UNPACK_BYTES_PER_SECOND, Facts
from restore.decide.remembered import Findings
from restore.decide.rules import Strictness
from restore.decide.source import read_kernels

if TYPE_CHECKING:
    from oci.cache.image import CacheImage
    from rekindle.cuda.search import Search


def gather(
    verified: Verified[images.Image],
    reference: Reference,
    home: Home,
    given: Sequence[str],
    *,
    with_cache: bool,
    with_abilities: bool = True,
    starting: "Search | None" = None,
) -> "tuple[Facts, Verified[CacheImage] | None]":
    """Return the facts about an image, and its kernel cache if that was read.

    The kernel cache's config is read only with `with_cache`, or if the process needs missing files that may
    be in it. With `starting`, a driver that is starting, only what is known of it so far counts.
    """
    found = verified.value
    record = found.record
    findings = Findings(home.compared)
    different = match_loaded.mapped(record, findings)
    missing = any(different.get(file.path) == "missing" for file in record.mapped_files)
    read = found.cache is not None and (with_cache or missing)
    kernels = read_kernels(verified) if read else None
    unpacked = dumps.is_ready(home, found)
    is_local = isinstance(reference, LayoutReference)
    with_neutral = found.neutral is not None and with_cache
    neutral = None
    if with_neutral:
        neutral = neutral_facts(verified.map(images.load_neutral), home, given, is_local=is_local)
    engine = from_record(record.engine.name, record.endpoint, record.engine.options)
    facts = Facts(
        node=Fingerprint.probe(given or record.command, os.environ),
        abilities=_abilities(found, home, starting) if with_abilities else Abilities(),
        image=found,
        cache=kernels.value if kernels else None,
        cache_unread=found.cache is not None and not read,
        neutral=neutral,
        neutral_unread=found.neutral is not None and not with_neutral,
        different=different,
        loaded=[
            *(match_loaded.compare(record, given, os.environ, findings) if with_abilities else ()),
            *match_directories.compare(record),
            *(match_needs.compare(found, home, unpacked=unpacked) if with_abilities else ()),
        ],
        local=is_local,
        unpacked=unpacked,
        has_memory=not unpacked and dumps.has_memory(home, found),
        kept_layers=frozenset() if unpacked else frozenset(dumps.kept_layers(home, found)),
        fetch_bytes_per_second=_fetch_bytes_per_second(home, reference),
        unpack_bytes_per_second=UNPACK_BYTES_PER_SECOND if unpacked else _unpack_bytes_per_second(home),
        given=list(given) or None,
        variables=match_environment.compare(record, engine, os.environ, given),
        enforced=engine.enforced(),
        environment=os.environ,
        api_keys=match_api_key.today(record, given, os.environ),
        gpu_choice=GpuChoice(free_bytes=gpu.free_bytes() if record.process.gpus else {}),
    )
    return facts, kernels


def neutral_facts(
    verified: Verified[images.Image], home: Home, given: Sequence[str], *, is_local: bool
) -> NeutralFacts:
    """Return what is known of an image's neutral process here. `is_local`: nothing has to be fetched."""
    image = verified.value
    record = image.record
    findings = Findings(home.compared)
    engine = from_record(record.engine.name, record.endpoint, record.engine.options)
    return NeutralFacts(
        record=record,
        different=match_loaded.mapped(record, findings),
        loaded=match_loaded.compare(record, given, os.environ, findings),
        variables=match_environment.compare(record, engine, os.environ, given),
        fetch_bytes=0 if is_local or dumps.is_ready(home, image) else sum(each.size for each in image.layers),
    )


def of_image(
    image: images.Image,
    home: Home,
    kernels: "CacheImage | None" = None,
    able: Abilities | None = None,
) -> Facts:
    """Return the facts about an image that need not be trusted, and this node, for who only looks at them.

    Without `able`, nothing is tried.
    """
    record = image.record
    return Facts(
        node=Fingerprint.probe(record.command),
        abilities=able or Abilities(memory_bytes=memory.available_bytes()),
        image=image,
        cache=kernels,
        different=match_loaded.mapped(record),
        loaded=[
            *match_loaded.compare(record, (), os.environ),
            *match_directories.compare(record),
            *match_needs.compare(image, home, unpacked=dumps.is_ready(home, image)),
        ],
    )


def _unpack_bytes_per_second(home: Home) -> float:
    from restore import fetch_rates

    return fetch_rates.known_unpacking(home) or UNPACK_BYTES_PER_SECOND


def _fetch_bytes_per_second(home: Home, reference: Reference) -> float:
    if isinstance(reference, LayoutReference):
        return FETCH_BYTES_PER_SECOND
    from restore import fetch_rates

    return fetch_rates.known(home, reference) or FETCH_BYTES_PER_SECOND


def _abilities(found: images.Image, home: Home, starting: "Search | None") -> Abilities:
    able = abilities.probe(home)
    if not found.record.process.cuda_pids:
        return able
    if problem := starting.problem() if starting else abilities.cuda_problem(home):
        return structs.replace(able, problems={**able.problems, "cuda": problem})
    return able


def without_image(given: Sequence[str]) -> Facts:
    """Return the facts without an image: this node, and the command."""
    return Facts(node=Fingerprint.probe(), abilities=Abilities(), given=list(given) or None)


def load(source: Verified[FoundImage]) -> Verified[images.Image]:
    """Return the image of a verified source: its manifests and its record. Fetches no layer."""
    return source.map(lambda each: images.load(each.blobs, each.root, each.limits))


def strictness(path: Path | None = None, accepted: Sequence[str] = ()) -> Strictness:
    """Return how strict a policy, by default that of $REKINDLE_HOME, is about differences between nodes.

    `accepted` are patterns of variables that may differ, besides those of the policy. Raises UsageError if
    it names an unknown rule.
    """
    if path is None:
        with contextlib.suppress(UsageError):  # without a writable home, there is no policy either
            home = Home.from_environment()
            path = home.policy if home.policy.exists() else None
    policy = Policy.read(path) if path else Policy()
    return Strictness(soft=policy.soft, hard=policy.hard, variables=frozenset((*policy.variables, *accepted)))
