# SPDX-License-Identifier: Apache-2.0
"""The core: this node, cells, CRIU, CUDA, engines and secrets. It knows no image and no command."""

__version__ = "0.1.0"
