# SPDX-License-Identifier: Apache-2.0
"""Run `rekindle restore` with a parsed command line. Imported late, so that --help is fast."""

import argparse
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cli import _arguments, _replica_options, _report, _trust
from cli._console import Console
from rekindle.cell import Cell
from rekindle.errors import UsageError
from rekindle.home import Home
from rekindle.replicas import Registration, register
from rekindle.report import Rung
from restore.client_address import ClientAddress
from restore.flow import LOWER_STATUS, plan, require_one, restore
from restore.options import Lazy, Memory, Options, Output

if TYPE_CHECKING:
    from cli._detach import Detached


def run(
    args: argparse.Namespace, command: Sequence[str], cell: Cell | None, detached: "Detached | None" = None
) -> int:
    """Restore, into a cell that boots, or print the plan; return the exit status."""
    waited = 0.0
    if args.await_client is not None:
        from cli._await_client import await_client

        waited = await_client(args.listen_fds, args.await_client)
    options = options_of(args, command, detached.index if detached else 0, waited)
    if args.plan:
        return _show_plan(options, as_json=args.json)
    _report.refuse_unwritable(args.report)
    with contextlib.ExitStack() as stack:
        registration = detached.registration if detached else _register(args, command)
        if registration is not None and detached is None:
            stack.enter_context(registration)
        wakes = registration is not None and bool(registration.status.hibernated)
        status = restore(options, Console(args, detached, wakes=wakes), cell, registration)
        if registration is not None:
            registration.end(status)
    return status


def options_of(
    args: argparse.Namespace, command: Sequence[str], index: int = 0, waited: float = 0.0
) -> Options:
    """Return the options of a parsed command line."""
    return Options(
        image=args.image,
        command=tuple(command),
        rung=args.rung,
        require=args.require or Rung.COLD,
        publish=tuple(args.publish),
        listen_early=args.listen_early,
        shared_port=args.shared_port,
        client_address=ClientAddress(args.client_address) if args.client_address else None,
        listening=args.listen_fds,
        waited_seconds=waited,
        replica_index=index,
        ready_url=args.ready_url,
        ready_file=args.ready_file,
        process_deadline=args.process_deadline,
        cache_deadline=args.cache_deadline,
        cache_dir=args.cache_dir,
        paranoid=args.paranoid,
        memory=Memory(args.memory),
        lazy=Lazy(args.lazy),
        prefetch=not args.no_prefetch,
        accept_environment=tuple(args.accept_environment),
        gpus=tuple(args.gpu),
        trust=_trust.options(args),
        registry=_arguments.registry(args),
        # With --json, only the report goes to stdout.
        output=Output(stdout=2 if args.json else 1, stderr=2),
    )


def _register(args: argparse.Namespace, command: Sequence[str]) -> Registration | None:
    """Register the replica for `rekindle ps`; return None where nothing can be kept."""
    try:
        options = _replica_options.words(args)
        return register(
            Home.from_environment(), args.name, args.image, options=options, command=command, wakes=args.wakes
        )
    except OSError:
        return None
    except UsageError as error:
        if args.name and not isinstance(error.__cause__, OSError):
            raise
        return None  # such as a read-only home: the server can run without an entry


def _show_plan(options: Options, *, as_json: bool) -> int:
    """Print the plan; return the exit status of a restore that succeeds on the first possible rung."""
    from cli import _plan

    decision = plan(options)
    digest = decision.source.image.value.index.digest if decision.source else ""
    _plan.show(decision.plan, decision.facts, options.image, digest, as_json=as_json)
    require_one(decision, options.require)
    return 0 if decision.plan.steps[0].possible else LOWER_STATUS
