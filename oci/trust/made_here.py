# SPDX-License-Identifier: Apache-2.0
"""Sign images that were made here, by this machine's key and the user's."""

from collections.abc import Mapping, Sequence

from oci import media_types
from oci.descriptor import Descriptor
from oci.image import Image
from oci.layout import Layout
from oci.trust import signer, verifier
from oci.trust.machine import machine_key
from oci.trust.policy import TrustRule
from oci.trust.verifier import Verified
from rekindle.fields import JSON
from rekindle.home import Home


def sign(
    staging: Layout,
    subjects: Sequence[Descriptor],
    attested: Mapping[str, JSON],
    by: signer.Sign | None,
    home: Home,
) -> tuple[list[Descriptor], list[Descriptor]]:
    """Sign images that were made here, and attach the signatures to them in their layout.

    Returns the signatures by this machine's key, for the local store only, and those by `by`.
    """
    own = signer.sign(
        staging,
        subjects,
        signer.by_key(machine_key(home)),
        attested=attested,
        annotations={media_types.SIGNER: media_types.MACHINE},
    )
    given = signer.sign(staging, subjects, by, attested=attested) if by is not None else []
    staging.attach(staging, [*own, *given])
    return own, given


def verify(image: Image, staging: Layout, home: Home) -> Verified[Image]:
    """Verify an image that was just made, in the same way as any other."""
    rule = TrustRule(name="", keys=(machine_key(home).public,))
    return verifier.verify(image, staging, image.index, rule, image.limits)
