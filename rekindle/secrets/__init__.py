# SPDX-License-Identifier: Apache-2.0
"""Recognize secrets, and keep them out of output and records."""

HIDDEN = "REDACTED"
"""The text that stands in place of a secret."""
