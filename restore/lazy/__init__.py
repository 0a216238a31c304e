# SPDX-License-Identifier: Apache-2.0
"""Start a server before all of its image is here: its memory is fetched while it runs."""
