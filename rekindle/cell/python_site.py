# SPDX-License-Identifier: Apache-2.0
"""Load `rekindle_hook` into a Python process, then the `sitecustomize` of its own.

`rekindle.cell.hook` puts a copy named sitecustomize.py into the cell, in a directory on PYTHONPATH. Of a
Python that is too old for the hook, nothing is changed.
"""

import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120

if sys.version_info >= (3, 9):  # noqa: UP036 - it is the server's Python
    _without_bytecode, sys.dont_write_bytecode = sys.dont_write_bytecode, False  # in the cell alone
    import rekindle_hook  # type: ignore[import-not-found]  # noqa: F401

    sys.dont_write_bytecode = _without_bytecode

_own = sys.modules.pop("sitecustomize")
_path, sys.path[:] = sys.path[:], [entry for entry in sys.path if os.path.abspath(entry) != _here]  # noqa: PTH100
try:
    import sitecustomize  # type: ignore[import-not-found]  # noqa: F401 - the one that it would have without us
except ImportError as error:
    if getattr(error, "name", "sitecustomize") != "sitecustomize":
        raise
finally:
    # The directory stays on sys.path: some programs start children with PYTHONPATH made from it.
    if _here not in sys.path:
        sys.path.insert(_path.index(_here) if _here in _path else 0, _here)
    sys.modules.setdefault("sitecustomize", _own)
