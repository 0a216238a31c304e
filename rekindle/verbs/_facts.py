# SPDX-License-Identifier: Apache-2.0
"""What a plan depends on, gathered: the image's record, this node, and what is here already."""

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from oci import image as images
from oci.reference import LayoutReference, Reference
from oci.trust.verifier import Verified
from rekindle import abilities
from rekindle.abilities import Abilities
from rekindle.fingerprint import Fingerprint
from rekindle.home import Home
from rekindle.verbs._options import Source
from restore import dumps, match
from restore.plan import Facts

if TYPE_CHECKING:
    from oci.cache import CacheImage
    from rekindle.cuda import Search


def gather(
    found: images.Image,
    reference: Reference,
    home: Home,
    given: Sequence[str],
    *,
    with_cache: bool,
    with_abilities: bool = True,
    starting: "Search | None" = None,
) -> Facts:
    """The facts about an image whose record was read. The kernel cache's config is read only with
    `with_cache`, or if the process needs files that it may bring. With a driver that is `starting`, what is
    known of it before it has started must do."""
    record = found.record
    different = match.look(record)
    lacking = any(different.get(file.path) == "missing" for file in record.mapped_files)
    read = found.cache is not None and (with_cache or lacking)
    return Facts(
        node=Fingerprint.probe(given or record.command, os.environ),
        abilities=_abilities(found, home, starting) if with_abilities else Abilities(),
        image=found,
        cache=_cache(found) if read else None,
        cache_unread=found.cache is not None and not read,
        different=different,
        local=isinstance(reference, LayoutReference),
        unpacked=dumps.is_ready(home, found),
        given=list(given) or None,
    )


def _cache(found: images.Image) -> "CacheImage":
    from oci import cache  # most restores need none

    assert found.cache is not None
    return cache.load(found.blobs, found.cache, found.limits)


def _abilities(found: images.Image, home: Home, starting: "Search | None") -> Abilities:
    able = abilities.probe(home)
    if not found.record.process.cuda_pids:
        return able
    if lack := starting.lack() if starting else abilities.cuda_lack(home):
        return dataclasses.replace(able, lacks={**able.lacks, "cuda": lack})
    return able


def of_nothing(given: Sequence[str]) -> Facts:
    """The facts where no image can be reached: this node, and the command."""
    return Facts(node=Fingerprint.probe(), abilities=Abilities(), given=list(given) or None)


def trusted(source: Verified[Source]) -> Verified[images.Image]:
    """The image of a source that was verified: its manifests and its record. No layer is touched."""
    return source.map(lambda each: images.load(each.blobs, each.root, each.limits))
