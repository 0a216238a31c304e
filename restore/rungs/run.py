# SPDX-License-Identifier: Apache-2.0
"""What every rung of one restore is handed besides the decision."""

from dataclasses import dataclass

from rekindle.report import Report
from restore.options import Listener, Options
from restore.serve.announce import Announcer
from restore.signals import Signals


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One restore: what was asked for, and who is told.

    Work is done where `signals` raises, so that it can be broken off at any moment; clean-up never is.
    """

    options: Options
    report: Report
    listener: Listener
    signals: Signals
    announcer: Announcer
