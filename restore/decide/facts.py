# SPDX-License-Identifier: Apache-2.0
"""What a plan depends on, gathered: the image's record, this node, and what is here already."""

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oci import image as images
from oci.reference import LayoutReference, Reference
from oci.resolve import FoundImage
from oci.trust.policy import Policy
from oci.trust.verifier import Verified
from rekindle.errors import UsageError
from rekindle.home import Home
from rekindle.node.fingerprint import Fingerprint
from restore import dumps
from restore.decide import abilities, match_process
from restore.decide.abilities import Abilities
from restore.decide.plan import Facts
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
    """Return the facts about an image whose record was read, and its kernel cache if that was looked at.

    That is done only with `with_cache`, or if the process needs files that the cache may bring. With a driver
    that is `starting`, what is known of it before it has started must do.
    """
    found = verified.value
    record = found.record
    different = match_process.differing_files(record)
    lacking = any(different.get(file.path) == "missing" for file in record.mapped_files)
    read = found.cache is not None and (with_cache or lacking)
    kernels = read_kernels(verified) if read else None
    facts = Facts(
        node=Fingerprint.probe(given or record.command, os.environ),
        abilities=_abilities(found, home, starting) if with_abilities else Abilities(),
        image=found,
        cache=kernels.value if kernels else None,
        cache_unread=found.cache is not None and not read,
        different=different,
        local=isinstance(reference, LayoutReference),
        unpacked=dumps.is_ready(home, found),
        given=list(given) or None,
    )
    return facts, kernels


def _abilities(found: images.Image, home: Home, starting: "Search | None") -> Abilities:
    able = abilities.probe(home)
    if not found.record.process.cuda_pids:
        return able
    if lack := starting.problem() if starting else abilities.cuda_lack(home):
        return dataclasses.replace(able, lacks={**able.lacks, "cuda": lack})
    return able


def without_image(given: Sequence[str]) -> Facts:
    """Return the facts where no image can be reached: this node, and the command."""
    return Facts(node=Fingerprint.probe(), abilities=Abilities(), given=list(given) or None)


def load(source: Verified[FoundImage]) -> Verified[images.Image]:
    """Return the image of a source that was verified: its manifests and its record. No layer is touched."""
    return source.map(lambda each: images.load(each.blobs, each.root, each.limits))


def strictness(path: Path | None = None) -> Strictness:
    """What a policy, or that of $REKINDLE_HOME, says of differences between nodes. Raises UsageError for a
    rule that there is none."""
    if path is None:
        with contextlib.suppress(UsageError):  # where nothing can be written, there is no policy either
            home = Home.from_environment()
            path = home.policy if home.policy.exists() else None
    policy = Policy.read(path) if path else Policy()
    return Strictness(soft=policy.soft, hard=policy.hard)
