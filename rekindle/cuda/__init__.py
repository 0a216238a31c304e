# SPDX-License-Identifier: Apache-2.0
"""What processes hold on NVIDIA GPUs, moved into their memory and back, so that CRIU can dump and restore it.

    running ── lock ──▶ locked ── checkpoint ──▶ checkpointed
            ◀─ unlock ─        ◀─── restore ────

    door        what can be asked of the driver, and its errors
    driver      by the driver's own API (570 or newer), through client, a program that loads it
    utility     by NVIDIA's cuda-checkpoint (555 or newer)
    search      which of the two works here
    session     all processes of a server at once, or none; and the repair of what a killed command left

docs/adr/0009-cuda-doors.md says why. Nothing here is imported on a node without such a GPU.
"""
