# SPDX-License-Identifier: Apache-2.0
"""A workhorse, or what a test has put in its place: `paddock.py PLACE PORT`.

So one command is a server that can be snapshotted, and later, on a lower rung, whatever a test needs: the
file PLACE/instead holds a command, as JSON, that gets the port as its last word.
"""

import json
import os
import sys
from pathlib import Path

place, port = Path(sys.argv[1]), sys.argv[2]
argv = [sys.executable, str(Path(__file__).with_name("workhorse.py"))]
if (place / "instead").exists():
    argv = json.loads((place / "instead").read_text())
os.execvp(argv[0], [*argv, port])
