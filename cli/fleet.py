# SPDX-License-Identifier: Apache-2.0
"""`rekindle fleet`: plan which models run and lie ready on which nodes, and simulate what that costs."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cli import _arguments
from rekindle.errors import CapabilityError

if TYPE_CHECKING:
    from rekindle.fleet.plan import FleetPlan
    from rekindle.fleet.problem import Fleet

_KEEP_SECONDS = (30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def main(words: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="rekindle fleet",
        formatter_class=_arguments.Formatter,
        description="Plan for each hour how many replicas of each model run and lie ready on which class of "
        "nodes, and how many nodes are on, at the least cost that keeps the promised waits. FILE describes "
        "nodes, models, demand and service: docs/fleet.md.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="plan|simulate")
    planning = verbs.add_parser("plan", formatter_class=_arguments.Formatter, help="print a plan")
    planning.add_argument("--picture", type=Path, metavar="SVG", help="draw the nodes that are on")
    planning.add_argument(
        "--configmap", type=Path, metavar="YAML", help="write it as a ConfigMap for agents and Deployments"
    )
    simulating = verbs.add_parser(
        "simulate", formatter_class=_arguments.Formatter, help="compare the plan with other policies"
    )
    simulating.add_argument(
        "--seeds", type=_seeds, default=5, metavar="N", help="simulate each policy N times (default: 5)"
    )
    for each in (planning, simulating):
        each.add_argument("file", type=Path, metavar="FILE", help="description of the fleet, in TOML")
        each.add_argument("--json", action="store_true", help="print one JSON document")
    args = parser.parse_args(words)
    from rekindle.fleet import problem

    fleet = problem.read(args.file)
    try:
        from rekindle.fleet import plan
    except ImportError as error:
        hint = "pip install 'rekindle-llm[fleet]'"
        raise CapabilityError("planning needs HiGHS", cause=str(error), hint=hint) from None
    made = plan.make(fleet)
    if args.verb == "simulate":
        _simulate(fleet, made, args.seeds, as_json=args.json)
    else:
        _show(fleet, made, args)
    return 0 if not made.missing else 3


def _show(fleet: "Fleet", made: "FleetPlan", args: argparse.Namespace) -> None:
    from cli import _fleet_output

    if args.picture:
        args.picture.write_text(_fleet_output.picture(fleet, made))
    if args.configmap:
        args.configmap.write_text(_fleet_output.configmap(made))
    if args.json:
        print(json.dumps(_fleet_output.document(made), indent=1))
        return
    for line in _fleet_output.lines(fleet, made):
        print(line)


def _simulate(fleet: "Fleet", made: "FleetPlan", seeds: int, *, as_json: bool) -> None:
    from cli import _fleet_output
    from rekindle.fleet.policies import planned, rivals
    from rekindle.fleet.simulate import simulate

    rows = {
        policy.name: [simulate(fleet, policy, seed) for seed in range(1, seeds + 1)]
        for policy in (planned(made), *rivals(fleet, made, _KEEP_SECONDS))
    }
    if as_json:
        print(json.dumps(_fleet_output.outcomes_document(rows), indent=1))
        return
    for line in _fleet_output.outcome_lines(fleet, rows):
        print(line)


def _seeds(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"invalid number of simulations '{text}'")
    return int(text)
