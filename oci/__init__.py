# SPDX-License-Identifier: Apache-2.0
"""Snapshots and kernel caches as OCI images: find, verify, copy, pack and unpack them.

    from oci import copy, verify

    copy("tiny", "registry.example.com/models/tiny:1")

docs/library.md shows more. What a name stands for is imported when it is first asked for: a program that
looks at one module pays for that module alone.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oci.flow import copy, verify
    from oci.options import RegistryOptions, TrustOptions

__all__ = ["RegistryOptions", "TrustOptions", "copy", "verify"]


def __getattr__(name: str) -> Any:
    if name in {"copy", "verify"}:
        from oci import flow

        return getattr(flow, name)
    if name in {"RegistryOptions", "TrustOptions"}:
        from oci import options

        return getattr(options, name)
    raise AttributeError(f"module 'oci' has no attribute {name!r}")
