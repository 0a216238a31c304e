# SPDX-License-Identifier: Apache-2.0
"""Registries for tests: the real docker-registry, and a simulator that can misbehave."""
