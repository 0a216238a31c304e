# SPDX-License-Identifier: Apache-2.0
"""What a secret looks like, and how it is kept out of what is shown or saved."""
