# SPDX-License-Identifier: Apache-2.0
"""Plan by linear programming how many replicas run and lie ready on which class of nodes, and on how many.

Each model gets a class, and in each period a number of replicas that run. Those that it needs beyond that
lie ready, hibernated or as an image on the disk, and share room that is kept for all models of the class: it
suffices but for a share of the time that the service allows (`rekindle.fleet.need`). Where a ready start
takes longer than requests may wait, all that are needed must run. In units of a node, with x = 1 for the
number of replicas that is chosen:

    minimize    sum of price * nodes
    for each period, class, resource:   sum of (used(x) + effective(x)) + reserve <= nodes
    for each model and period:          one number of replicas, on the one class of the model

See docs/adr/0038-fleet.md.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

from msgspec import Struct

from rekindle.errors import MismatchError
from rekindle.fleet import problem
from rekindle.fleet.need import Need, quantile_of_sum
from rekindle.fleet.problem import Fleet, NodeClass, ServedModel
from rekindle.fleet.program import Program, Solution

RESOURCES = ("gpus", "memory", "disk")

_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.85, 0.95)
_MISSING_FACTOR = 1000.0  # what a node that does not exist costs, against one that does
_WHOLE_COLUMNS = 60000  # larger programs are decomposed
_WHOLE_SECONDS = 45.0
_GAP = 0.005
_PERIOD_SECONDS = 5.0
_ROUNDS = 2  # of choosing the parameters of the effective bandwidths by the last solution


class ModelPlan(Struct, frozen=True, kw_only=True):
    """The replicas of a model in a period: those that run, and how many more lie ready.

    `copies` are the nodes of the class that have the image.
    """

    model: str
    node_class: str
    running: int
    ready: int
    copies: int


class PeriodPlan(Struct, frozen=True, kw_only=True):
    """A period: the nodes of each class that are on, and the replicas of each model."""

    nodes: Mapping[str, int]
    models: tuple[ModelPlan, ...]


class Bottleneck(Struct, frozen=True, kw_only=True):
    """The limits of a class: the periods in which each resource does, and what another node would save.

    The saving is that of the linear program, over all periods; 0 unless every node of the class is used.
    """

    node_class: str
    periods: Mapping[str, int]
    saving: float


class FleetPlan(Struct, frozen=True, kw_only=True):
    """A plan and its cost.

    `program_cost` is that of the program, which reserves a little more than is needed in the end, and `bound`
    one that no solution of the program can go below. `missing` are the nodes that the demand needs and the
    fleet does not have, by class, in the worst period.
    """

    periods: tuple[PeriodPlan, ...]
    cost: float
    program_cost: float
    bound: float
    missing: Mapping[str, int]
    bottlenecks: tuple[Bottleneck, ...]

    @property
    def gap(self) -> float:
        """The share of its cost that a better solution of the program might save at most."""
        return max(0.0, 1 - self.bound / self.program_cost) if self.program_cost else 0.0


class _Choice(Struct, frozen=True, kw_only=True):
    """So many replicas of a model run on a class, in a period."""

    model: int
    node_class: int
    replicas: int
    pooled: bool  # what is needed beyond them lies ready


def make(fleet: Fleet) -> FleetPlan:
    """Make a plan. Raises MismatchError if a model cannot be served in time on any class."""
    return _Planner(fleet).plan()


class _Planner:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        # Requests are late since too few replicas of their model run, or since the common room is full.
        self._late = fleet.service.late_share / 2
        self._needs = _needs(fleet)
        self._choices = [list(self._choices_in(period)) for period in range(fleet.periods)]
        self._thetas: dict[tuple[int, int, str], float] = {}

    def plan(self) -> FleetPlan:
        relaxed = self._tuned()
        columns = sum(map(len, self._choices))
        solved = None
        if columns <= _WHOLE_COLUMNS:
            whole = _Model(self, range(self._fleet.periods))
            solution = whole.program.solve(gap=_GAP, seconds=_WHOLE_SECONDS)
            if solution is not None:
                solved = [whole.chosen(solution, period) for period in range(self._fleet.periods)]
                bound, cost = max(solution.bound, relaxed.solution.cost), solution.cost
        if solved is None:
            bound = relaxed.solution.cost
            homes = relaxed.homes()
            parts = [self._solve_period(period, homes) for period in range(self._fleet.periods)]
            solved, cost = [choices for choices, _ in parts], math.fsum(each for _, each in parts)
        return self._result(solved, cost, bound, relaxed)

    def _tuned(self) -> "_Relaxed":
        """Solve the linear program, and again with parameters that fit its solution."""
        classes = len(self._fleet.classes)
        shares = [
            [(choice, 1.0 / classes) for choice in choices if choice.replicas == 0 or not choice.pooled]
            for choices in self._choices
        ]
        for round_number in range(_ROUNDS + 1):
            self._tune(shares)
            model = _Model(self, range(self._fleet.periods))
            solution = model.program.solve(relaxed=True)
            assert solution is not None, "nodes may be missing, so some plan exists"
            if round_number == _ROUNDS:
                return _Relaxed(self._fleet, self._choices, model, solution)
            shares = [
                [
                    (choice, solution.values[column])
                    for choice, column in zip(choices, model.columns[period], strict=True)
                    if solution.values[column] > 1e-6
                ]
                for period, choices in enumerate(self._choices)
            ]
        raise AssertionError

    def _solve_period(self, period: int, homes: Sequence[int]) -> tuple[list[_Choice], float]:
        model = _Model(self, [period], homes)
        solution = model.program.solve(gap=_GAP, seconds=_PERIOD_SECONDS)
        assert solution is not None, "nodes may be missing, so some plan exists"
        return model.chosen(solution, period), solution.cost

    def _choices_in(self, period: int) -> Iterator[_Choice]:
        late = self._late
        for number, model in enumerate(self._fleet.models):
            need = self._needs[number][period]
            all_of_it = need.quantile(1 - late)
            for index, node in enumerate(self._fleet.classes):
                if node.name not in model.starts or not problem.fits(model, node):
                    continue
                if model.starts[node.name].ready > self._fleet.service.wait_seconds:
                    yield _Choice(model=number, node_class=index, replicas=all_of_it, pooled=False)
                    continue
                levels = {0, all_of_it, *(min(need.quantile(each), all_of_it) for each in _QUANTILES)}
                for replicas in sorted(levels):
                    yield _Choice(model=number, node_class=index, replicas=replicas, pooled=True)

    def usage(self, choice: _Choice, period: int, resource: str) -> float:
        """Return what a choice takes of a resource, in nodes of its class, without the common reserve."""
        model, node = self._fleet.models[choice.model], self._fleet.classes[choice.node_class]
        if resource == "disk":
            return self.copies(choice, period) * model.image_bytes / max(1, node.disk_bytes)
        running, weight = self.running(choice, resource), _weight(model, node, resource)
        if not choice.pooled or not weight:
            return running
        theta = self._thetas[period, choice.node_class, resource]
        return running + self._needs[choice.model][period].effective(choice.replicas, weight, theta)

    def running(self, choice: _Choice, resource: str) -> float:
        """Return what the replicas that run take of GPUs or memory, in nodes."""
        model, node = self._fleet.models[choice.model], self._fleet.classes[choice.node_class]
        if resource == "gpus":
            return _weight(model, node, resource) * choice.replicas
        used = model.own_bytes * choice.replicas
        used += model.shared_bytes * math.ceil(choice.replicas / problem.fits(model, node))
        return used / max(1, node.memory_bytes)

    def reserve(self, period: int, node_class: int, resource: str) -> float:
        """Return the room for all models of a class that is kept beside their effective bandwidths."""
        if resource == "disk":
            return 0.0
        return math.log(1 / self._late) / self._thetas[period, node_class, resource]

    def copies(self, choice: _Choice, period: int) -> int:
        """Return on how many nodes an image must be, so that all replicas find room on them."""
        model, node = self._fleet.models[choice.model], self._fleet.classes[choice.node_class]
        most = self._needs[choice.model][period].quantile(1 - self._late)
        return max(1, math.ceil(max(most, choice.replicas) / problem.fits(model, node)))

    def _tune(self, shares: Sequence[Sequence[tuple[_Choice, float]]]) -> None:
        """Choose the parameters with which the room for these shares of choices is least."""
        for period, given in enumerate(shares):
            for index, node in enumerate(self._fleet.classes):
                here = [(choice, share) for choice, share in given if choice.node_class == index]
                for resource in ("gpus", "memory"):
                    parts = [
                        (self._needs[choice.model][period], choice.replicas, weight, share)
                        for choice, share in here
                        if choice.pooled
                        and (weight := _weight(self._fleet.models[choice.model], node, resource))
                    ]
                    self._thetas[period, index, resource] = self._least(parts)

    def _least(self, parts: Sequence[tuple[Need, int, float, float]]) -> float:
        """Return the parameter that minimizes the room, by golden-section search over its logarithm."""
        spare = math.log(1 / self._late)

        def room(exponent: float) -> float:
            theta = math.exp(exponent)
            return spare / theta + sum(
                share * need.effective(replicas, weight, theta) for need, replicas, weight, share in parts
            )

        low, high, ratio = math.log(1e-2), math.log(1e3), (math.sqrt(5) - 1) / 2
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        at_left, at_right = room(left), room(right)
        while high - low > 0.1:
            if at_left < at_right:
                high, right, at_right = right, left, at_left
                left = high - ratio * (high - low)
                at_left = room(left)
            else:
                low, left, at_left = left, right, at_right
                right = low + ratio * (high - low)
                at_right = room(right)
        return math.exp((low + high) / 2)

    def nodes(self, choices: Sequence[_Choice], period: int) -> list[int]:
        """Return how many nodes of each class these choices need.

        What is needed beyond those that run is added up exactly here, where the program had a bound of it.
        """
        found = []
        for index in range(len(self._fleet.classes)):
            here = [choice for choice in choices if choice.node_class == index]
            disk = sum(self.usage(choice, period, "disk") for choice in here)
            most = max((self.room(here, period, each) for each in ("gpus", "memory")), default=0.0)
            copies = max((self.copies(choice, period) for choice in here), default=0)
            found.append(max(copies, math.ceil(max(disk, most) - 1e-6)))
        return found

    def room(self, choices: Sequence[_Choice], period: int, resource: str) -> float:
        """Return what these choices need of a resource in nodes, but for the allowed share of time."""
        pooled = []
        fixed = 0.0
        for choice in choices:
            model, node = self._fleet.models[choice.model], self._fleet.classes[choice.node_class]
            weight = _weight(model, node, resource)
            fixed += self.running(choice, resource)
            if choice.pooled and weight:
                pooled.append((self._needs[choice.model][period], choice.replicas, weight))
        return fixed + quantile_of_sum(pooled, self._late)

    def _result(
        self, solved: Sequence[Sequence[_Choice]], program_cost: float, bound: float, relaxed: "_Relaxed"
    ) -> FleetPlan:
        fleet = self._fleet
        periods, cost, missing = [], 0.0, dict.fromkeys((each.name for each in fleet.classes), 0)
        late = self._late
        for period, choices in enumerate(solved):
            counts = self.nodes(choices, period)
            for node, count in zip(fleet.classes, counts, strict=True):
                missing[node.name] = max(missing[node.name], count - node.nodes)
                cost += node.price * count * problem.PERIOD_SECONDS / 3600
            models = []
            for choice in sorted(choices, key=lambda each: each.model):
                most = self._needs[choice.model][period].quantile(1 - late)
                models.append(
                    ModelPlan(
                        model=fleet.models[choice.model].name,
                        node_class=fleet.classes[choice.node_class].name,
                        running=choice.replicas,
                        ready=max(0, most - choice.replicas) if choice.pooled else 0,
                        copies=self.copies(choice, period),
                    )
                )
            nodes = {node.name: count for node, count in zip(fleet.classes, counts, strict=True)}
            periods.append(PeriodPlan(nodes=nodes, models=tuple(models)))
        return FleetPlan(
            periods=tuple(periods),
            cost=cost,
            program_cost=program_cost,
            bound=min(bound, program_cost),
            missing={name: count for name, count in missing.items() if count > 0},
            bottlenecks=relaxed.bottlenecks(),
        )


class _Model:
    """The program for some periods; with `homes`, the class of each model is given."""

    def __init__(self, planner: _Planner, periods: Sequence[int], homes: Sequence[int] | None = None) -> None:
        self._planner, fleet = planner, planner._fleet
        self.program = Program()
        self.columns: dict[int, list[int]] = {}
        self.nodes: dict[tuple[int, int], int] = {}
        self.limits: dict[tuple[int, int, str], int] = {}
        homed = self._homes(fleet) if homes is None else {}
        for period in periods:
            self._add_period(planner, period, homes, homed)

    def _homes(self, fleet: Fleet) -> dict[tuple[int, int], int]:
        """Add a column for each model and class on which it may run: 1 if that is its class."""
        homed = {
            (number, index): self.program.column(upper=1.0, integer=True)
            for number, model in enumerate(fleet.models)
            for index, node in enumerate(fleet.classes)
            if node.name in model.starts and problem.fits(model, node)
        }
        for number in range(len(fleet.models)):
            self.program.row({col: 1.0 for (m, _), col in homed.items() if m == number}, least=1.0, most=1.0)
        return homed

    def _add_period(
        self,
        planner: _Planner,
        period: int,
        homes: Sequence[int] | None,
        homed: Mapping[tuple[int, int], int],
    ) -> None:
        fleet, choices = planner._fleet, planner._choices[period]
        allowed = [choice for choice in choices if homes is None or homes[choice.model] == choice.node_class]
        columns = {id(choice): self.program.column(upper=1.0, integer=True) for choice in allowed}
        self.columns[period] = [columns.get(id(choice), -1) for choice in choices]
        for number in range(len(fleet.models)):
            mine = [choice for choice in allowed if choice.model == number]
            for index in {choice.node_class for choice in mine}:
                row = {columns[id(choice)]: 1.0 for choice in mine if choice.node_class == index}
                if homes is None:
                    self.program.row({**row, homed[number, index]: -1.0}, least=0.0, most=0.0)
                else:
                    self.program.row(row, least=1.0, most=1.0)
        for index, node in enumerate(fleet.classes):
            here = [choice for choice in allowed if choice.node_class == index]
            if here:
                self._add_class(planner, period, index, node, [(each, columns[id(each)]) for each in here])

    def _add_class(
        self,
        planner: _Planner,
        period: int,
        index: int,
        node: NodeClass,
        here: Sequence[tuple[_Choice, int]],
    ) -> None:
        """Add the nodes of a class, those that are missing, and what limits their number."""
        price = max(node.price, 1e-6) * problem.PERIOD_SECONDS / 3600
        on = self.program.column(price, node.nodes, integer=True)
        missing = self.program.column(_MISSING_FACTOR * price)
        self.nodes[period, index] = on
        pooled = self.program.column(upper=1.0)
        by_model: dict[int, dict[int, float]] = {}
        for choice, column in here:
            by_model.setdefault(choice.model, {})[column] = 1.0
            if choice.pooled:
                self.program.row({pooled: 1.0, column: -1.0}, least=0.0)
        for number, row in by_model.items():
            copies = max(planner.copies(choice, period) for choice, _ in here if choice.model == number)
            self.program.row({on: 1.0, missing: 1.0, **dict.fromkeys(row, -float(copies))}, least=0.0)
        for resource in RESOURCES:
            used = {column: planner.usage(choice, period, resource) for choice, column in here}
            if not any(used.values()):
                continue
            used[pooled] = planner.reserve(period, index, resource)
            row = {on: 1.0, missing: 1.0, **{column: -each for column, each in used.items()}}
            self.limits[period, index, resource] = self.program.row(row, least=0.0)

    def chosen(self, solution: Solution, period: int) -> list[_Choice]:
        """Return the choices of a period that a solution makes."""
        return [
            choice
            for choice, column in zip(self._planner._choices[period], self.columns[period], strict=True)
            if column >= 0 and solution.values[column] > 0.5
        ]


class _Relaxed:
    """The linear program over all periods, and its solution."""

    def __init__(
        self, fleet: Fleet, choices: Sequence[Sequence[_Choice]], model: _Model, solution: Solution
    ) -> None:
        self._fleet, self._choices, self._model, self.solution = fleet, choices, model, solution

    def homes(self) -> list[int]:
        """Return for each model the class on which most of it runs."""
        shares = [[0.0] * len(self._fleet.classes) for _ in self._fleet.models]
        for period, choices in enumerate(self._choices):
            for choice, column in zip(choices, self._model.columns[period], strict=True):
                shares[choice.model][choice.node_class] += self.solution.values[column]
        return [max(range(len(each)), key=each.__getitem__) for each in shares]

    def bottlenecks(self) -> tuple[Bottleneck, ...]:
        found = []
        for index, node in enumerate(self._fleet.classes):
            periods = {
                resource: sum(
                    1
                    for period in range(self._fleet.periods)
                    if (row := self._model.limits.get((period, index, resource))) is not None
                    and self.solution.row_duals[row] > 1e-9
                )
                for resource in RESOURCES
            }
            saving = -sum(
                min(0.0, self.solution.column_duals[column])
                for (_, other), column in self._model.nodes.items()
                if other == index
            )
            found.append(
                Bottleneck(
                    node_class=node.name,
                    periods={name: count for name, count in periods.items() if count},
                    saving=round(saving, 6),
                )
            )
        return tuple(found)


def _needs(fleet: Fleet) -> list[list[Need]]:
    """Return the need of each model in each period. Raises MismatchError if a model can run nowhere."""
    for model in fleet.models:
        if not any(
            problem.fits(model, fleet.node_class(name)) for name in model.starts
        ):  # the description was checked, but may have been made by a program
            raise MismatchError(f"the model {model.name} fits on no node")
    return [[Need.of(model, period) for period in range(fleet.periods)] for model in fleet.models]


def _weight(model: ServedModel, node: NodeClass, resource: str) -> float:
    """Return the share of a node's resource that a replica takes that is started for a while."""
    if resource == "gpus":
        return model.gpus / node.gpus if model.gpus else 0.0
    return (model.own_bytes + model.shared_bytes) / max(1, node.memory_bytes)
