# SPDX-License-Identifier: Apache-2.0
"""How hypothesis runs here: no database beside the code, no deadline on a shared machine."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit",
    deadline=None,
    database=None,
    # Examples share tmp_path: each makes what it needs anew, or a directory of its own.
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("unit")
