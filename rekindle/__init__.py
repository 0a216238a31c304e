# SPDX-License-Identifier: Apache-2.0
"""The kernel of rekindle: hosts and tools, no policy."""

__version__ = "0.1.0"
