# SPDX-License-Identifier: Apache-2.0
"""Making a snapshot: start, warm, ask, check, dump, record."""
