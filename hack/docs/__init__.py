# SPDX-License-Identifier: Apache-2.0
"""Generators of the pages in docs/ that follow from the code."""
