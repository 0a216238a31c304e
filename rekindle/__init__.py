# SPDX-License-Identifier: Apache-2.0
"""The core: this node, cells, CRIU, CUDA, engines and secrets. It knows nothing of images and commands."""

__version__ = "0.1.0"
