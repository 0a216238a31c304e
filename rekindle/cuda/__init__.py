# SPDX-License-Identifier: Apache-2.0
"""Move the state that processes hold on NVIDIA GPUs into their memory and back, so that CRIU can dump it.

    running ── lock ──▶ locked ── checkpoint ──▶ checkpointed
            ◀─ unlock ─        ◀─── restore ────

    backend     the interface of the two backends, and their errors
    driver      the driver's own API (570 or newer), called by client, a program that loads it
    utility     NVIDIA's cuda-checkpoint (555 or newer)
    search      find the backend that works here
    keep        keep GPUs initialized while no server holds them
    session     act on all processes of a server or on none; repair what a killed command left

docs/adr/0009-cuda-backends.md gives the reasons. Only `search` is imported on a node without such a GPU.
"""
