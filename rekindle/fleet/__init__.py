# SPDX-License-Identifier: Apache-2.0
"""Plan which models run, hibernate and lie ready on which nodes, and simulate what that costs."""
