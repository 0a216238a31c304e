# SPDX-License-Identifier: Apache-2.0
"""A vLLM that is not there, as far as rekindle has to do with it: `vllm serve MODEL`, sleep mode, and the
snapshot server. tests/fakes/vllm.py installs it.

    cli         the command line: what is not known is refused, as vLLM does
    api         the HTTP server: a little ASGI application, with middleware and development endpoints
    engine      the engine, in a process of its own, which holds the weights, and CUDA if FAKE_CUDA is set
    snapshot    vllm.snapshot.server, since 0.31

The file that FAKE_VLLM names, if it is there, is read at every order to the engine: {"fail": [ORDER],
"exit": [ORDER], "drift": true (other answers after a sleep), "lose": true (other weights after waking or
reloading)}.
"""
