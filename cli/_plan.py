# SPDX-License-Identifier: Apache-2.0
"""Print a plan for `match`, `restore --plan` and `inspect`. docs/format.md describes the JSON document."""

from typing import Any

from cli import _report
from rekindle.node.fingerprint import Fingerprint
from rekindle.report import Rung
from rekindle.text import printable
from restore.decide.plan import SCHEMA, Facts, Plan, Step


def document(plan: Plan, facts: Facts, reference: str, digest: str) -> dict[str, Any]:
    """Return the plan and the nodes that it compares, as JSON."""
    return {
        "schema": SCHEMA,
        "image": {"reference": reference, "digest": digest},
        **plan.to_json(),
        "recorded": facts.image.record.node.to_json() if facts.image else None,
        "here": facts.node.to_json(),
    }


def show(plan: Plan, facts: Facts, reference: str, digest: str, *, as_json: bool) -> None:
    """Print the plan to stdout."""
    if as_json:
        _report.print_document(document(plan, facts, reference, digest))
        return
    print(printable(f"{'image':<12}{reference} {digest}"))
    for line in lines(plan):
        print(printable(line))


def lines(plan: Plan) -> list[str]:
    """Return a line for each rung, followed by its differences, hard and harmless."""
    found = []
    first = plan.first
    for step in plan.steps:
        mark = "→" if step is first else "no" if not step.possible else "or"
        found.append(f"{step.rung:<12}{mark:<3}{_estimate(step)}".rstrip())
        found += [
            f"{'':<15}{'' if reason.hard else '(harmless) '}{reason}"
            + (f" — {reason.advice}" if reason.hard and reason.advice else "")
            + (" [by policy]" if reason.by_policy else "")
            for reason in step.reasons
        ]
    found += [f"{'device map':<12}{old} → {new}" for old, new in plan.device_map.items()]
    return found


def fields(recorded: Fingerprint, here: Fingerprint) -> list[str]:
    """Return lines with the facts of two nodes side by side, marked `=` or `≠`."""
    rows = {
        name: (_value(name, recorded.to_json()[name]), _value(name, value))
        for name, value in here.to_json().items()
        if name not in {"cpu_features", "limits"}
    }
    found = [f"{'':<15}{'recorded':<42} here"]
    for name, (was, now) in rows.items():
        if was or now:
            found.append(
                f"{name:<12} {'=' if was == now else '≠'} {was[:41]:<42} {'' if was == now else now[:60]}"
            )
    return [line.rstrip() for line in found]


def _value(name: str, value: Any) -> str:
    if name in {"xsave", "capabilities"}:
        return f"{value:#x}"
    if isinstance(value, dict):
        return " ".join(f"{name} {version}" for name, version in sorted(value.items()))
    if isinstance(value, list | tuple):
        return ", ".join(str(each.get("name")) if isinstance(each, dict) else str(each) for each in value)
    return "" if value in {False} else str(value)


def _estimate(step: Step) -> str:
    if not step.possible:
        return ""
    parts = [f"fetches {step.fetch_bytes:,} bytes"]
    if step.seconds is not None:
        parts.append(f"takes about {step.seconds:.1f} s")
    if step.deadline_seconds is not None:
        what = "the cache must be in place" if step.rung is Rung.CACHE else "must answer"
        parts.append(f"{what} within {step.deadline_seconds:.0f} s")
    return ", ".join(parts)
