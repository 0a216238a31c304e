# SPDX-License-Identifier: Apache-2.0
"""Tools for working on rekindle: shell commands, and the Python modules behind them.

The modules run as `python -m hack.NAME` in rekindle's environment, where the root of the checkout is on
`sys.path`. Three files run by their path, in a Python without it: `gpu/server.py` and `tiny_model.py` in the
environment of a model server, `gpu/unpack.py` on a machine that has no checkout yet.
"""
