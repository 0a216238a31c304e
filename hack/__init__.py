# SPDX-License-Identifier: Apache-2.0
"""The tools of this checkout: shell commands, and the Python behind them.

The Python runs as `python -m hack.NAME` in rekindle's environment, which has the checkout's root on its
path. Three files run in the Python of another and by their path: `gpu/server.py` and `tiny_model.py` in that
of a model server, `gpu/unpack.py` on a machine that has no checkout yet.
"""
