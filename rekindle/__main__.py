# SPDX-License-Identifier: Apache-2.0
"""The console script: run one command, and turn errors into text and an exit status."""

import contextlib
import importlib
import os
import select
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from rekindle.errors import Interrupted, RekindleError
from rekindle.text import printable

# Each command is a module of cli, with _ for -, imported only when it is run.
VERBS = {
    "snapshot": "start a server, warm it, and save it as an image",
    "restore": "restore a saved server, and serve",
    "run": "run a server in a cell, to be saved while it runs",
    "ps": "list the servers that run",
    "logs": "print what a detached server has written",
    "stop": "end servers, gracefully or not",
    "wait": "wait until a server ends",
    "hibernate": "save a restored server, and let go of its memory",
    "wake": "bring a hibernated server back",
    "exec": "run a command in the cell of a server",
    "push": "push an image to a registry",
    "pull": "pull an image from a registry",
    "copy": "copy an image between any two places",
    "tags": "list the tags of a repository",
    "list": "list the images, dumps and caches that are kept",
    "rm": "remove images from the local store",
    "prune": "remove what no server uses",
    "login": "log in to a registry",
    "logout": "remove the credentials for a registry",
    "pack-cache": "pack a kernel cache as an image",
    "extract": "extract the kernel cache of an image",
    "sign": "sign an image",
    "verify": "verify the signature of an image",
    "generate-key-pair": "generate a key pair for signing",
    "inspect": "show what an image contains",
    "match": "compare this node with a snapshot, field by field",
    "doctor": "check what this node can do, and what is missing",
    "metrics": "print or serve metrics for Prometheus",
    "dashboard": "show servers, starts and images in a browser",
    "fleet": "plan which models run on which nodes, and simulate it",
    "completion": "print the completion of commands for a shell",
    "bench": "compare cold starts with restores, by phase",
}
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_AGAIN_SECONDS = 0.01
_BUG_STATUS = 1
_USAGE_STATUS = 2
_PIPE_STATUS = 128 + signal.SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; see docs/errors.md."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help", "help"}:
        print(_usage())
        return 0 if words else _USAGE_STATUS
    if words[0] in {"-V", "--version"}:
        from rekindle import __version__

        print(f"rekindle {__version__}")
        return 0
    if words[0] not in VERBS:
        print(f"rekindle: unknown command {words[0]!r}\n\n{_usage()}", file=sys.stderr)
        return _USAGE_STATUS
    _import_msgspec()  # before the handlers: interrupted by an exception, it crashes at its first use
    _handle_signals()
    try:
        verb = importlib.import_module(f"cli.{words[0].replace('-', '_')}")
        status = verb.main(words[1:])
        assert isinstance(status, int)
        return status
    except Interrupted as interrupted:
        from rekindle.criu import remove_leftovers

        remove_leftovers()
        return 128 + interrupted.signum
    except RekindleError as error:
        _print_error(error)
        return error.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return _PIPE_STATUS
        from rekindle.os_errors import from_os_error

        if failure := from_os_error(error):
            _print_error(failure)
            return failure.exit_status
        return _report_bug()
    except Exception:
        return _report_bug()


def _import_msgspec() -> None:
    """Import msgspec with typing_extensions hidden, which imports `inspect`: 9 ms of each start.

    The typing of Python 3.11 has all that msgspec takes from there. `doctor` runs without msgspec, too.
    """
    name = "typing_extensions"
    if name in sys.modules:
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        with contextlib.suppress(ImportError):
            import msgspec  # noqa: F401
    finally:
        del sys.modules[name]


def _report_bug() -> int:
    """Print the exception that is being handled, and return the exit status."""
    import traceback  # takes 4 ms

    traceback.print_exc()
    return _BUG_STATUS


def _open_standard_files() -> None:
    """Open descriptors 0, 1 and 2 if they are closed; otherwise a file of ours could become stdout."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        pass
    os.close(fd)


def _handle_signals() -> None:
    """Raise Interrupted for signals that ask us to end, unless they are ignored, as under nohup."""
    handled = [signum for signum in _ENDING if signal.getsignal(signum) is not signal.SIG_IGN]

    def raise_again(lost: "sys.UnraisableHookArgs") -> None:
        error = lost.exc_value
        if not isinstance(error, Interrupted) or signal.getsignal(error.signum) is not signal.SIG_IGN:
            sys.__unraisablehook__(lost)
            return
        import threading

        for each in handled:
            signal.signal(each, _interrupt)
        threading.Timer(_AGAIN_SECONDS, os.kill, [os.getpid(), error.signum]).start()

    # Python drops an exception that is raised in a callback of the garbage collector or of an import.
    sys.unraisablehook = raise_again
    for signum in handled:
        signal.signal(signum, _interrupt)


def _interrupt(signum: int, _: object) -> NoReturn:
    for each in _ENDING:  # a second signal must not interrupt the clean-up
        signal.signal(each, signal.SIG_IGN)
    raise Interrupted(signum)


def _reader_is_gone() -> bool:
    """Tell whether the reader of our standard output has exited, as `head` in a pipe does early."""
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _print_error(error: RekindleError) -> None:
    from rekindle import log

    if log.is_json():
        log.write_error(error.message, **_facts(error))
        return
    lines = [f"rekindle: error: {error.message}"]
    if error.cause:
        lines.append("  cause: " + "\n         ".join(error.cause.splitlines()))
    lines += [f"  server: {error.server}"] if error.server else []
    lines += [f"  hint:  {error.hint}"] if error.hint else []
    lines += [f"  log:   {error.log}"] if error.log else []
    if error.command:
        from rekindle.run import replay

        lines.append(f"  ran:   {replay(error.command)}")
    with contextlib.suppress(OSError):
        print(printable("\n".join(lines), lines=True), file=sys.stderr)


def _facts(error: RekindleError) -> dict[str, str | int]:
    """Return what is known about an error beside its message."""
    from rekindle.run import replay

    found = {
        "code": error.code,
        "cause": error.cause,
        "hint": error.hint,
        "server": error.server,
        "log": str(error.log or ""),
        "ran": replay(error.command),
    }
    return {"exit_status": error.exit_status, **{name: text for name, text in found.items() if text}}


def _usage() -> str:
    verbs = "\n".join(f"  {name:<19}{summary}" for name, summary in VERBS.items())
    return (
        "usage: rekindle COMMAND …      (details: rekindle COMMAND --help)\n\n"
        f"{verbs}\n\n"
        "An IMAGE is one of:\n"
        "  name[:tag]                               in the local store\n"
        "  oci:DIR[:tag]                            in an OCI image layout\n"
        "  HOST[:PORT]/repository[:tag][@digest]    in a registry"
    )


def run() -> NoReturn:
    """Run as the console script, and exit."""
    _open_standard_files()
    status = 0
    try:
        status = main()
        sys.stdout.flush()
    except BrokenPipeError:
        status = status or _PIPE_STATUS
    except OSError:
        pass
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)  # nothing is left to do, and finalizing the interpreter takes 30 ms


if __name__ == "__main__":
    run()
