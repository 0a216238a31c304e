# SPDX-License-Identifier: Apache-2.0
"""Registries for tests.

access            who may come in
docker_registry   the real docker-registry, as a process
simulator         one in the process of the test, by the OCI distribution specification 1.1
misbehaviour      what the simulator does wrong, case by case
"""
