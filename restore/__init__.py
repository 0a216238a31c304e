# SPDX-License-Identifier: Apache-2.0
"""Using a snapshot: match, unpack, restore, serve."""
