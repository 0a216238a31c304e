# SPDX-License-Identifier: Apache-2.0
"""The decision: facts about the image and this node, the comparison, the plan. No effect but reading."""
