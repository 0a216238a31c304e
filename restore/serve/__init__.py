# SPDX-License-Identifier: Apache-2.0
"""Serve a server's clients: its published address, its signals, its exit."""
