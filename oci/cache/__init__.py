# SPDX-License-Identifier: Apache-2.0
"""The kernel cache as an OCI image: packing, the inventory, reading it back."""
