# SPDX-License-Identifier: Apache-2.0
"""A server that was brought up: its published address, its clients, its signals, its end."""
