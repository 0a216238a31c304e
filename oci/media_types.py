# SPDX-License-Identifier: Apache-2.0
"""The media types and artifact types of a snapshot's parts; docs/format.md says what each holds."""

INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"

SNAPSHOT = "application/vnd.rekindle.snapshot.v1"
PROCESS = "application/vnd.rekindle.process.v1"
RECORD = "application/vnd.rekindle.record.v1+json"
DUMP_LAYER = "application/vnd.rekindle.dump.v1+zstd"
