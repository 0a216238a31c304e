# SPDX-License-Identifier: Apache-2.0
"""The rungs of the ladder: the process, the kernel cache, a cold start; each undone if it fails."""
