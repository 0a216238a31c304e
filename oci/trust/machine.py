# SPDX-License-Identifier: Apache-2.0
"""The key of this machine. It signs what is made here, and is trusted in the local store only."""

from collections.abc import Mapping, Sequence

from oci import media_types
from oci.descriptor import Descriptor
from oci.image import Image
from oci.layout import Layout
from oci.trust import signer, verifier
from oci.trust.keys import PrivateKey, PublicKey
from oci.trust.policy import TrustRule
from oci.trust.verifier import Verified
from rekindle.fields import JSON
from rekindle.files import locked, write_atomically
from rekindle.home import Home


def machine_public(home: Home) -> PublicKey | None:
    """Return the public key of this machine, or None if it has none yet."""
    path = home.root / "machine.pub"
    return PublicKey.read(path) if path.exists() else None


def machine_key(home: Home) -> PrivateKey:
    """Return the key of this machine, and make one if there is none. It never leaves $REKINDLE_HOME."""
    path = home.root / "machine.key"
    with locked(home.root / "lock"):
        if not path.exists():
            write_atomically(path, PrivateKey.generate().to_pem(), mode=0o600)
        key = PrivateKey.read(path, b"")
        public = home.root / "machine.pub"
        if not public.exists():  # it is written second: the process that made the key may have been killed
            write_atomically(public, key.public.to_pem())
        return key


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


def verify_made_here(image: Image, staging: Layout, home: Home) -> Verified[Image]:
    """Verify an image that was just made, in the same way as any other."""
    rule = TrustRule(name="", keys=(machine_key(home).public,))
    return verifier.verify(image, staging, image.index, rule, image.limits)
