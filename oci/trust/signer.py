# SPDX-License-Identifier: Apache-2.0
"""Sign images: their digests, and for a snapshot an attestation of how it was made."""

from collections.abc import Callable, Mapping, Sequence

from msgspec import structs

from oci.descriptor import Descriptor
from oci.layout import Layout
from oci.trust import attachments
from oci.trust.bundle import Bundle
from oci.trust.keys import SigningKey
from oci.trust.statement import COSIGN_SIGN, SNAPSHOT, Statement
from rekindle.fields import JSON
from rekindle.record import Record

Sign = Callable[[Statement], Bundle]


def by_key(key: SigningKey) -> Sign:
    """Return a function that signs with a key."""
    return lambda statement: Bundle.sign(statement, key)


def sign(
    layout: Layout,
    images: Sequence[Descriptor],
    by: Sign,
    *,
    attested: Mapping[str, JSON] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> list[Descriptor]:
    """Write a signature of each image into a layout, and an attestation of the first if `attested` is given.

    Returns the manifests, which the layout's index does not list yet; their descriptors have `annotations`.
    """
    made = []
    for image in images:
        statement = Statement(subject=image.digest, predicate_type=COSIGN_SIGN, predicate={})
        made.append(attachments.store(layout, image, by(statement), COSIGN_SIGN))
    if attested is not None:
        statement = Statement(subject=images[0].digest, predicate_type=SNAPSHOT, predicate=attested)
        made.append(attachments.store(layout, images[0], by(statement), SNAPSHOT))
    return [structs.replace(each, annotations={**each.annotations, **(annotations or {})}) for each in made]


def predicate(record: Record) -> dict[str, JSON]:
    """Return the predicate of a snapshot's attestation; see docs/trust.md."""
    return {
        "created": record.created,
        "made_by": record.made_by,
        "engine": record.engine.name,
        "node": {
            "architecture": record.node.architecture,
            "cpu_model": record.node.cpu_model,
            "kernel": record.node.kernel,
            "packages": dict(record.node.packages),
            "gpus": [gpu.name for gpu in record.node.devices.gpus if gpu.uuid in record.process.gpus],
        },
        "criu": record.criu.version,
        "command": list(record.command),
        "weights": dict(record.weights),
    }
