# SPDX-License-Identifier: Apache-2.0
"""The commands: each module puts the packages together for one of them. See docs/adr/0002-verbs.md."""
