# SPDX-License-Identifier: Apache-2.0
"""`rekindle dashboard`: show servers, their last starts, and images in a browser, on loopback."""

import argparse
import signal
from collections.abc import Sequence

from cli import _arguments, _report
from rekindle.errors import Interrupted, PortError
from rekindle.home import Home

_PORT = 7411


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle dashboard",
        formatter_class=_arguments.Formatter,
        description="Serve a page on 127.0.0.1 with the servers of this $REKINDLE_HOME, the phases of their "
        "last starts, and its images, and with buttons to wake, hibernate and stop servers. Prints the "
        "address, which holds a secret: whoever has it can do what the buttons do.",
    )
    parser.add_argument(
        "--port",
        type=_port,
        default=_PORT,
        metavar="PORT",
        help=f"port of the page; 0 for any that is free (default: {_PORT})",
    )
    args = parser.parse_args(words)
    home = Home.from_environment()
    from cli._dashboard_server import DashboardServer

    try:
        server = DashboardServer(home, args.port)
    except OSError as error:
        raise PortError(f"cannot listen on 127.0.0.1:{args.port}", cause=str(error)) from None
    with server:
        _report.console(quiet=False)("open this in a browser of this machine; end with Ctrl-C")
        print(server.address, flush=True)
        try:
            server.serve_forever()
        except Interrupted as interrupted:
            if interrupted.signum not in {signal.SIGTERM, signal.SIGINT}:
                raise
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"invalid port '{text}'")
    return int(text)
