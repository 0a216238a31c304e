# SPDX-License-Identifier: Apache-2.0
"""Makers of the pages in docs/ that are generated from the code."""
