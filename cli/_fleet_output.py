# SPDX-License-Identifier: Apache-2.0
"""Show a plan of a fleet and simulations of it: lines, JSON, a picture, a ConfigMap."""

import json
from collections.abc import Iterator, Mapping, Sequence

from cli._bench_picture import escape
from rekindle import documents
from rekindle.fields import JSON
from rekindle.fleet.estimate import estimate
from rekindle.fleet.plan import FleetPlan
from rekindle.fleet.problem import Fleet
from rekindle.fleet.simulate import Simulated

_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860")
_SHOWN = ("cost", "late_share", "p50_seconds", "p99_seconds", "starts", "absent_starts", "idle_share")


def document(plan: FleetPlan) -> dict[str, JSON]:
    """Return the plan as a JSON document."""
    return {"schema": "rekindle.fleet-plan/1", **documents.to_json(plan), "gap": plan.gap}


def lines(fleet: Fleet, plan: FleetPlan) -> Iterator[str]:
    """Yield what a person should read of a plan."""
    names = [each.name for each in fleet.classes]
    yield "hour    " + "".join(f"{name:>14}" for name in names) + "       running         ready"
    for number, period in enumerate(plan.periods):
        nodes = "".join(f"{period.nodes.get(name, 0):>14}" for name in names)
        running, ready = (sum(getattr(each, what) for each in period.models) for what in ("running", "ready"))
        yield f"{number:>4}    {nodes}{running:>14}{ready:>14}"
    yield f"cost    {plan.cost:.2f}; no such plan costs less than {plan.bound:.2f} (gap {plan.gap:.1%})"
    for each in plan.bottlenecks:
        if each.periods:
            limits = ", ".join(f"{name} in {count} hours" for name, count in each.periods.items())
            saving = f"; another node would save {each.saving:.2f}" if each.saving else ""
            yield f"limits  {each.node_class}: {limits}{saving}"
    for name, count in plan.missing.items():
        yield f"MISSING {name}: {count} more nodes are needed in the worst hour"


def configmap(plan: FleetPlan) -> str:
    """Return the plan as a ConfigMap: images for each class, and replicas of each model by hour."""
    import yaml

    copies: dict[str, dict[str, int]] = {}
    for period in plan.periods:
        for each in period.models:
            of_class = copies.setdefault(each.node_class, {})
            of_class[each.model] = max(of_class.get(each.model, 0), each.copies)
    replicas = [{each.model: each.running for each in period.models} for period in plan.periods]
    data = {f"images.{name}": json.dumps(found) for name, found in sorted(copies.items())}
    data["nodes"] = json.dumps([period.nodes for period in plan.periods])
    data["min-replicas"] = json.dumps(replicas)
    return yaml.safe_dump(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "rekindle-fleet"}, "data": data},
        sort_keys=False,
    )


def picture(fleet: Fleet, plan: FleetPlan) -> str:
    """Draw the nodes that are on in each period, one colour per class, as SVG 1.1."""
    width, height, left, top = 760, 260, 48, 40
    most = max((sum(period.nodes.values()) for period in plan.periods), default=0) or 1
    step = (width - left - 20) / len(plan.periods)
    body = [f"<text x='12' y='22'>Nodes that are on, by hour; cost {plan.cost:.2f}</text>"]
    for number, period in enumerate(plan.periods):
        bottom = float(height - 30)
        for index, each in enumerate(fleet.classes):
            tall = (height - 30 - top) * period.nodes.get(each.name, 0) / most
            bottom -= tall
            body.append(
                f"<rect x='{left + number * step:.1f}' y='{bottom:.1f}' width='{step * 0.86:.1f}' "
                f"height='{tall:.1f}' fill='{_COLOURS[index % len(_COLOURS)]}'/>"
            )
        if number % max(1, len(plan.periods) // 12) == 0:
            body.append(f"<text x='{left + number * step:.1f}' y='{height - 12}'>{number}</text>")
    body.append(f"<text x='8' y='{top + 10}'>{most}</text><text x='8' y='{height - 30}'>0</text>")
    for index, each in enumerate(fleet.classes):
        at = left + 300 + 110 * index
        body.append(
            f"<rect x='{at}' y='12' width='12' height='12' fill='{_COLOURS[index % len(_COLOURS)]}'/>"
        )
        body.append(f"<text x='{at + 17}' y='22'>{escape(each.name)}</text>")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{height}' font-family='sans-serif' "
        "font-size='13' fill='#222'>\n<rect width='100%' height='100%' fill='white'/>\n"
        + "\n".join(body)
        + "\n</svg>\n"
    )


def outcome_lines(fleet: Fleet, rows: Mapping[str, Sequence[Simulated]]) -> Iterator[str]:
    """Yield a table of simulated policies: means, and half the width of the cost's 95 % interval."""
    yield (
        f"{'policy':<14}{'cost':>18}{'late':>9}{'p50':>9}{'p99':>9}{'starts':>9}{'absent':>8}{'idle':>7}"
        f"   (n = {len(next(iter(rows.values())))}; late: over {fleet.service.wait_seconds:g} s)"
    )
    for name, outcomes in rows.items():
        found = {what: estimate([getattr(each, what) for each in outcomes]) for what in _SHOWN}
        late = found["late_share"].mean
        cost = f"{found['cost'].mean:.2f} ± {found['cost'].half_width:.2f}"
        yield (
            f"{name:<14}{cost:>18}{late:>9.2%}{found['p50_seconds'].mean:>7.2f} s"
            f"{found['p99_seconds'].mean:>7.2f} s{found['starts'].mean:>9.0f}"
            f"{found['absent_starts'].mean:>8.0f}{found['idle_share'].mean:>7.0%}"
            + ("" if late <= fleet.service.late_share else "   too late")
        )


def outcomes_document(rows: Mapping[str, Sequence[Simulated]]) -> dict[str, JSON]:
    """Return the outcomes of all simulations as a JSON document."""
    policies = {name: [documents.to_json(each) for each in outcomes] for name, outcomes in rows.items()}
    return {"schema": "rekindle.fleet-simulation/1", "policies": policies}
