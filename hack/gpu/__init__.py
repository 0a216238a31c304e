# SPDX-License-Identifier: Apache-2.0
"""The acceptance test of rekindle on a machine with an NVIDIA GPU; see docs/gpu/README.md.

    acceptance   the command line; runs the steps, each with its deadline
    steps        the steps, in their order
    checkpoints  steps that checkpoint a live server through the driver
    rollback     the failures that one of those steps provokes
    measure      operations that steps share: starts, snapshots, restores
    starts       one start of a server, timed to its first token
    subjects     the servers under test
    trial        the options and directories of one run
    journal      the results so far, and the files of the report
    report       the Markdown of the report
    errors       how a step can end early

    server       the server; runs by its path, in a Python with torch
    decoder      its model; kernels: the GPU kernels of that model
    stand_in     the model without a GPU

    bundle       packs everything for a machine without a network
    unpack       installs that there; runs by its path, in any Python

Steps are functions that share nothing but their `Trial`. What a later step or run needs is in the journal.
"""
