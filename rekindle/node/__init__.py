# SPDX-License-Identifier: Apache-2.0
"""Describe a node: its fingerprint, its GPUs, and the packages and files that a server uses."""
