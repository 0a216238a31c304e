# SPDX-License-Identifier: Apache-2.0
"""The kernel cache as an OCI image: pack it, describe it, extract it."""
