# SPDX-License-Identifier: Apache-2.0
"""What a plan depends on, gathered: the image's record, this node, and what is here already."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from oci import image as images
from oci.reference import LayoutReference, Reference
from oci.resolve import Source
from oci.trust.verifier import Verified
from rekindle import os_errors
from rekindle.errors import CapabilityError, UsageError
from rekindle.home import Home
from rekindle.node.fingerprint import Fingerprint
from restore import dumps
from restore.decide import abilities, match_process
from restore.decide.abilities import Abilities
from restore.decide.plan import Facts

if TYPE_CHECKING:
    from oci.cache.image import CacheImage
    from rekindle.cuda.search import Search


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
    different = match_process.look(record)
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
    from oci.cache import image as cache_image  # most restores need none

    assert found.cache is not None
    return cache_image.load(found.blobs, found.cache, found.limits)


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


_DECIDE_SECONDS = 30.0  # for who can start without the image, as registries may be patient


@contextlib.contextmanager
def _naming_lacks() -> Iterator[None]:
    """What the system refuses us within is a lack of this node."""
    try:
        yield
    except OSError as error:
        told = os_errors.from_outside(error)
        if told is None:
            raise
        if isinstance(told, UsageError):
            told = CapabilityError(told.message, cause=told.cause)
        raise told from error
