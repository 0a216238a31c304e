# SPDX-License-Identifier: Apache-2.0
"""The commands, one module each. See docs/adr/0002-commands.md."""
