# SPDX-License-Identifier: Apache-2.0
"""What shows on a machine with an NVIDIA GPU that rekindle works there; see docs/gpu/README.md.

acceptance  the command line; the steps one after the other, each with its deadline
steps       what each step does, and in which order
measure     what several steps do: time starts, take snapshots, time restores
starts      a server from its start to its first token, by its command and by `rekindle restore`
subjects    the servers that are tried, and the options they depend on
rollback    failures of a checkpoint, one by one
journal     the results so far, and the report that is written from them
report      the report's Markdown
errors      how a step ends early

server      the server; runs in the Python that has torch, by its path
decoder     what it computes with: torch and Triton
stand_in    what takes the decoder's place without a GPU

bundle      packs all of this for a machine without a network
unpack      installs it there; runs alone, in any Python
"""
