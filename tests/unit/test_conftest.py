# SPDX-License-Identifier: Apache-2.0
"""What tests start is the same, however they themselves were started."""

import signal
import subprocess
import sys

from tests.conftest import ROOT

DEAF = """
import os, signal, sys
for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(signum, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD})
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""

STARTS = """
import os, signal, subprocess, tests.conftest
os.kill(os.getpid(), signal.SIGHUP)
subprocess.run(["cat", "/proc/self/status"], check=True)
"""


def test_no_signal_is_ignored_or_blocked_and_a_hangup_ends_nothing() -> None:
    command = [sys.executable, "-c", DEAF, "-c", STARTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    status = dict(line.split(":\t") for line in done.stdout.splitlines() if line.startswith("Sig"))
    stops = {signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU}  # a terminal's, and nothing of a test's
    # What glibc keeps for itself, Python cannot set either: it is as whoever started us left it.
    settable = sum(1 << (signum - 1) for signum in signal.valid_signals())
    assert int(status["SigIgn"], 16) & settable == sum(1 << (signum - 1) for signum in stops)
    assert int(status["SigBlk"], 16) == 0
