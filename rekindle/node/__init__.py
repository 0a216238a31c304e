# SPDX-License-Identifier: Apache-2.0
"""What a node is: its fingerprint, its GPUs, the packages and files that a server uses."""
