# SPDX-License-Identifier: Apache-2.0
"""Snapshots as OCI images: references, the local store, layers, manifests."""
