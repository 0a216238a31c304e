# SPDX-License-Identifier: Apache-2.0
"""The media types and artifact types of a snapshot's parts; see docs/format.md."""

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
# Everything that lists other blobs. Docker's older types mean the same.
DOCUMENTS = frozenset(
    {
        INDEX,
        MANIFEST,
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    }
)

EMPTY = "application/vnd.oci.empty.v1+json"  # of a config that says nothing

SNAPSHOT = "application/vnd.rekindle.snapshot.v1"
PROCESS = "application/vnd.rekindle.process.v1"
NEUTRAL = "application/vnd.rekindle.neutral.v1"
RECORD = "application/vnd.rekindle.record.v1+json"
DUMP_LAYER = "application/vnd.rekindle.dump.v1+zstd"

# The kernel cache is an ordinary image without an artifactType, so that MCV, skopeo and container runtimes
# accept it. An annotation on its descriptor in the snapshot's index marks it.
IMAGE_CONFIG = "application/vnd.oci.image.config.v1+json"
TAR_GZIP_LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
# Docker's older types mean the same. `docker push` and MCV make them, and `skopeo copy --format v2s2`.
IMAGE_MANIFESTS = frozenset({MANIFEST, "application/vnd.docker.distribution.manifest.v2+json"})
IMAGE_CONFIGS = frozenset({IMAGE_CONFIG, "application/vnd.docker.container.image.v1+json"})
TAR_GZIP_LAYERS = frozenset({TAR_GZIP_LAYER, "application/vnd.docker.image.rootfs.diff.tar.gzip"})
TITLE = "org.opencontainers.image.title"
ROLE = "vnd.rekindle.role"
CACHE_ROLE = "cache"
MEMORY_ROLE = "memory"  # of a layer with memory files alone

# Signatures and attestations: Sigstore's bundles, layers under the tags of cosign before 2.6, and Notation's.
BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
SIMPLE_SIGNATURE = "application/vnd.dev.cosign.simplesigning.v1+json"
SIGNATURE_ANNOTATION = "dev.cosignproject.cosign/signature"  # of such a layer
ENVELOPE = "application/vnd.dsse.envelope.v1+json"
NOTATION = "application/vnd.cncf.notary.signature"
SIGNATURES = frozenset({BUNDLE, SIMPLE_SIGNATURE, ENVELOPE, NOTATION})
PREDICATE = "dev.sigstore.bundle.predicateType"  # of the statement in a bundle
SIGN_PREDICATE = "https://sigstore.dev/cosign/sign/v1"
SNAPSHOT_PREDICATE = "https://rekindle.dev/attestations/snapshot/v1"
# In the index of a layout: the tag under which cosign before 2.6 finds what belongs to an image.
OWN_TAG = "vnd.rekindle.simple-signatures"

# Marks a signature by this machine's own key in the index of the local store; it is never copied elsewhere.
SIGNER = "vnd.rekindle.signer"
MACHINE = "machine"
