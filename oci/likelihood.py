# SPDX-License-Identifier: Apache-2.0
"""Tell which of many attachments are likely to be signatures, before any is read."""

from oci import cosign_tags, media_types
from oci.descriptor import Descriptor

LIMIT = 500  # how many attachments of an image are copied, and how many are read to find a signature
_SIGNATURES = frozenset({media_types.SIGN_PREDICATE, media_types.SNAPSHOT_PREDICATE})


def likelihood(listed: Descriptor) -> int:
    """Return how likely a listed attachment is a signature, for sorting: the likeliest have 0.

    What a list says is not proved. Other clients list a bundle without its predicate, or by the type of the
    empty config.
    """
    predicate = listed.annotations.get(media_types.PREDICATE)
    if tag := listed.annotations.get(media_types.OWN_TAG, ""):
        return 0 if tag.endswith(f".{cosign_tags.SIGNATURES}") else 2
    if listed.artifact_type in {media_types.BUNDLE, media_types.EMPTY, ""}:
        return 0 if predicate in _SIGNATURES else 1 if predicate is None else 2
    return 0 if listed.artifact_type in media_types.SIGNATURES else 3
