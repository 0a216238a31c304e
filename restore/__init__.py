# SPDX-License-Identifier: Apache-2.0
"""Restore a saved server: decide, go down the ladder, serve.

    from restore import Options, restore

    status = restore(Options(image="tiny", publish="8001"))

docs/library.md shows more. Names are imported when they are first used, so that a program which needs one
module does not load the others.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restore.flow import plan, restore
    from restore.listener import Listener
    from restore.options import Options, Output

__all__ = ["Listener", "Options", "Output", "plan", "restore"]


def __getattr__(name: str) -> Any:
    if name in {"plan", "restore"}:
        from restore import flow

        return getattr(flow, name)
    if name == "Listener":
        from restore.listener import Listener

        return Listener
    if name in {"Options", "Output"}:
        from restore import options

        return getattr(options, name)
    raise AttributeError(f"module 'restore' has no attribute {name!r}")
