# SPDX-License-Identifier: Apache-2.0
"""The values that every rung of a restore gets besides the decision."""

from msgspec import Struct

from rekindle.replicas import Registration
from rekindle.report import Report
from restore.listener import Listener
from restore.options import Options
from restore.read_ahead import ReadAhead
from restore.serve.announce import Announcer
from restore.signals import Signals


class Run(Struct, frozen=True, kw_only=True):
    """One restore: what was asked for, and where its progress is reported.

    `registration` is the replica's entry in this home, if it has one. `read_ahead` reads what the server of a
    lower rung will read, once it has begun.
    Work runs within `signals.raising`, so that it can be interrupted at any moment; clean-up does not.
    """

    options: Options
    report: Report
    listener: Listener
    signals: Signals
    announcer: Announcer
    read_ahead: ReadAhead
    registration: Registration | None = None
