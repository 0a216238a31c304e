# SPDX-License-Identifier: Apache-2.0
"""Simulate a fleet event by event: requests, starts, ends and failures, under a policy.

A request takes a free slot of the fullest replica, else it waits, in order. While more wait than the replicas
that are starting can serve, another one is started: on the fullest node that has the image and room, else on
one that has only room, else on a node that is switched on for it, if the policy may. A node is paid from the
decision to switch it on until it is off; nodes of a policy that scales go off as soon as they are empty,
which flatters it. The times between requests, the service times and the failures are exponential.
"""

import collections
import heapq
import itertools
import math
import random
from collections.abc import Mapping
from enum import StrEnum

from msgspec import Struct

from rekindle.fleet import problem
from rekindle.fleet.policies import ScalingPolicy
from rekindle.fleet.problem import PERIOD_SECONDS, Fleet, NodeClass, ServedModel

_Event = tuple[float, int, "_Kind", object, int]


class Simulated(Struct, frozen=True, kw_only=True):
    """The outcome of one simulation. Waits are until a request is served, in seconds."""

    requests: int
    cost: float
    late_share: float
    p50_seconds: float
    p99_seconds: float
    starts: int
    absent_starts: int
    failures: int
    idle_share: float  # of the time of GPUs that are paid; of replicas where there are none


class _Kind(StrEnum):
    ARRIVAL = "arrival"
    SERVED = "served"
    STARTED = "started"
    IDLE = "idle"
    PERIOD = "period"
    FAILURE = "failure"
    REPAIRED = "repaired"
    NODE_READY = "node-ready"


class _Node:
    __slots__ = (
        *("gpus", "images", "is_booting", "is_draining", "is_on"),
        *("kind", "memory", "replicas", "since", "sort"),
    )

    def __init__(self, kind: NodeClass, sort: int) -> None:
        self.kind, self.sort = kind, sort
        self.gpus, self.memory = kind.gpus, kind.memory_bytes
        self.replicas: dict[str, set[_Replica]] = {}
        self.images: dict[str, int] = {}
        self.is_on = self.is_booting = self.is_draining = False
        self.since = 0.0

    @property
    def is_empty(self) -> bool:
        return not self.replicas

    def has_room(self, model: ServedModel) -> bool:
        shared = 0 if model.name in self.replicas else model.shared_bytes
        return self.gpus >= model.gpus and self.memory >= model.own_bytes + shared

    def has_disk(self, model: ServedModel) -> bool:
        return model.name in self.images or (
            sum(size for name, size in self.images.items() if name in self.replicas) + model.image_bytes
            <= self.kind.disk_bytes
        )

    def keep(self, model: ServedModel) -> None:
        """Put an image on the disk; those that came first and that no replica uses make room."""
        self.images[model.name] = model.image_bytes
        used = sum(self.images.values())
        for name in list(self.images):
            if used <= self.kind.disk_bytes:
                return
            if name not in self.replicas and name != model.name:
                used -= self.images.pop(name)


class _Replica:
    __slots__ = ("busy", "epoch", "has_ended", "is_ready", "model", "node", "retires", "used")

    def __init__(self, model: "_ModelState", node: _Node, now: float) -> None:
        self.model, self.node = model, node
        self.busy = self.epoch = 0
        self.is_ready = self.retires = self.has_ended = False
        self.used = now


class _ModelState:
    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.replicas: dict[_Replica, None] = {}
        self.free: dict[_Replica, None] = {}  # with a free slot; the one that was used last is last
        self.waiting: collections.deque[float] = collections.deque()
        self.starting = 0
        self.warm = 0
        self.home: str | None = None


class _Simulation:
    def __init__(self, fleet: Fleet, policy: ScalingPolicy, seed: int) -> None:
        self._fleet, self._policy = fleet, policy
        self._random = random.Random(seed)  # noqa: S311 - a simulation
        self._events: list[_Event] = []
        self._numbers = itertools.count()
        self._models = {model.name: _ModelState(model) for model in fleet.models}
        self._nodes = {kind.name: [_Node(kind, sort) for sort in range(kind.nodes)] for kind in fleet.classes}
        self._used = {name: dict[_Node, None]() for name in self._nodes}  # that are on
        self._holders = {name: dict[_Node, None]() for name in self._models}  # that may have the image
        self._waits: list[float] = []
        self._cost = self._paid_gpus = self._busy_gpus = 0.0
        self._starts = self._absent = self._failures = 0
        self._now, self._end = 0.0, fleet.periods * PERIOD_SECONDS

    def run(self) -> Simulated:
        for period in range(self._fleet.periods):
            self._at(period * PERIOD_SECONDS, _Kind.PERIOD, period)
        for state in self._models.values():
            self._next_arrival(state)
        for kind in self._fleet.classes:
            if kind.hours_between_failures:
                for node in self._nodes[kind.name]:
                    self._next_failure(node)
        while self._events and self._events[0][0] < self._end:
            self._now, _, event, what, epoch = heapq.heappop(self._events)
            self._handle(event, what, epoch)
        self._now = self._end
        for on in self._used.values():
            for node in list(on):
                self._switch_off(node)
        for state in self._models.values():
            self._waits.extend(self._end - since for since in state.waiting)
        waits = sorted(self._waits) or [0.0]
        late = sum(wait > self._fleet.service.wait_seconds for wait in waits) / len(waits)
        return Simulated(
            requests=len(self._waits),
            cost=self._cost,
            late_share=late,
            p50_seconds=waits[len(waits) // 2],
            p99_seconds=waits[min(len(waits) - 1, int(len(waits) * 0.99))],
            starts=self._starts,
            absent_starts=self._absent,
            failures=self._failures,
            idle_share=1 - self._busy_gpus / self._paid_gpus if self._paid_gpus else 0.0,
        )

    def _at(self, moment: float, kind: _Kind, what: object, epoch: int = 0) -> None:
        heapq.heappush(self._events, (moment, next(self._numbers), kind, what, epoch))

    def _handle(self, kind: _Kind, what: object, epoch: int) -> None:
        match what:
            case _ModelState():
                self._arrive(what)
            case _Replica():
                if kind is _Kind.SERVED:
                    self._served(what)
                elif kind is _Kind.STARTED:
                    self._started(what)
                elif what.epoch == epoch and not what.busy:
                    self._idle(what)
            case _Node():
                if kind is _Kind.FAILURE:
                    self._fail(what)
                    return
                if kind is _Kind.NODE_READY and what.is_booting:
                    what.is_booting = False
                elif kind is _Kind.REPAIRED:
                    self._begin_period_nodes()
                self._keep_warm()
                self._start_waiting()
            case int():
                self._begin_period(what)

    # Requests.

    def _next_arrival(self, state: _ModelState) -> None:
        """Draw the next arrival of a Poisson process whose rate is constant within each step."""
        model, at = state.model, self._now
        left = self._random.expovariate(1.0)
        while at < self._end:
            rate = model.rate(at)
            step_end = (math.floor(at / model.step_seconds + 1e-9) + 1) * model.step_seconds
            if rate and left <= rate * (step_end - at):
                self._at(at + left / rate, _Kind.ARRIVAL, state)
                return
            left -= rate * (step_end - at)
            at = step_end

    def _arrive(self, state: _ModelState) -> None:
        self._next_arrival(state)
        if state.free:
            self._serve(next(reversed(state.free)), self._now)
            return
        state.waiting.append(self._now)
        self._start_for(state)

    def _serve(self, replica: _Replica, since: float) -> None:
        state = replica.model
        self._waits.append(self._now - since)
        replica.busy += 1
        replica.epoch += 1
        replica.used = self._now
        if replica.busy == state.model.concurrency:
            state.free.pop(replica, None)
        seconds = self._random.expovariate(1 / state.model.service_seconds)
        self._busy_gpus += seconds * max(1, state.model.gpus) / state.model.concurrency
        self._at(self._now + seconds, _Kind.SERVED, replica)

    def _served(self, replica: _Replica) -> None:
        state = replica.model
        if replica.has_ended:
            return  # with its node
        replica.busy -= 1
        if replica.retires:
            if not replica.busy:
                self._release(replica)
            return
        state.free.setdefault(replica)
        self._drain(replica)
        if not replica.busy:
            replica.epoch += 1
            if self._policy.idle_seconds < math.inf:
                self._at(self._now + self._policy.idle_seconds, _Kind.IDLE, replica, replica.epoch)
            if self._policy.evicts:
                self._start_waiting()

    def _drain(self, replica: _Replica) -> None:
        """Let a replica serve those who wait, as far as it can."""
        state = replica.model
        while state.waiting and replica.busy < state.model.concurrency:
            self._serve(replica, state.waiting.popleft())

    # Replicas.

    def _start_for(self, state: _ModelState) -> None:
        """Start as many replicas as those who wait need beside those that are starting."""
        while len(state.waiting) > state.starting * state.model.concurrency:
            if not self._start(state):
                return

    def _start_waiting(self) -> None:
        """Try again to start what found no room."""
        for state in self._models.values():
            if state.waiting:
                self._start_for(state)

    def _start(self, state: _ModelState) -> bool:
        node = self._find(state.model, state.home) or self._room_made(state)
        if node is None and self._policy.nodes is None:
            node = self._switched_on_for(state)
        if node is None:
            return False
        model, here = state.model, state.model.name in node.images
        start = model.starts[node.kind.name]
        self._starts += 1
        self._absent += not here
        self._keep(node, model)
        node.gpus -= model.gpus
        node.memory -= model.own_bytes + (0 if model.name in node.replicas else model.shared_bytes)
        replica = _Replica(state, node, self._now)
        node.replicas.setdefault(model.name, set()).add(replica)
        state.replicas[replica] = None
        state.starting += 1
        self._at(self._now + (start.ready if here else start.absent), _Kind.STARTED, replica)
        return True

    def _find(self, model: ServedModel, home: str | None) -> _Node | None:
        """Return the fullest node with room; one that has the image, if there is one."""
        holders = [node for node in self._holders[model.name] if model.name in node.images]
        everywhere = (node for name in model.starts for node in self._used[name])
        for nodes in (holders, everywhere):
            fitting = (
                node
                for node in nodes
                if home in {None, node.kind.name}
                and not node.is_booting
                and not node.is_draining
                and node.has_room(model)
                and node.has_disk(model)
            )
            if (found := min(fitting, key=lambda node: (node.gpus, node.memory), default=None)) is not None:
                return found
        return None

    def _room_made(self, state: _ModelState) -> _Node | None:
        """End replicas of others that have nothing to do, those first that were used longest ago."""
        if not self._policy.evicts:
            return None
        idle = (
            replica
            for other in self._models.values()
            if other is not state
            for replica in other.replicas
            if replica.is_ready and not replica.busy
        )
        for replica in sorted(idle, key=lambda each: each.used):
            if replica.node.kind.name in state.model.starts:
                self._retire(replica, leaves_node_on=True)
                if (node := self._find(state.model, state.home)) is not None:
                    return node
        return None

    def _started(self, replica: _Replica) -> None:
        state = replica.model
        if replica not in state.replicas:
            return
        state.starting -= 1
        replica.is_ready = True
        replica.used = self._now
        state.free[replica] = None
        self._drain(replica)
        if replica.busy == state.model.concurrency:
            state.free.pop(replica, None)
        elif not replica.busy and self._policy.idle_seconds < math.inf:
            self._at(self._now + self._policy.idle_seconds, _Kind.IDLE, replica, replica.epoch)

    def _idle(self, replica: _Replica) -> None:
        if replica in replica.model.replicas and len(replica.model.replicas) > replica.model.warm:
            self._retire(replica)
            self._start_waiting()

    def _retire(self, replica: _Replica, *, leaves_node_on: bool = False) -> None:
        """Give a replica no more requests, and end it as soon as it has served those that it has."""
        state = replica.model
        del state.replicas[replica]
        state.free.pop(replica, None)
        if not replica.is_ready:
            state.starting -= 1
        replica.retires = True
        if not replica.busy:
            self._release(replica, leaves_node_on=leaves_node_on)

    def _release(self, replica: _Replica, *, leaves_node_on: bool = False) -> None:
        model, node = replica.model.model, replica.node
        replica.has_ended = True
        together = node.replicas[model.name]
        together.discard(replica)
        node.gpus += model.gpus
        node.memory += model.own_bytes
        if not together:
            del node.replicas[model.name]
            node.memory += model.shared_bytes
        goes = node.is_draining or (self._policy.nodes is None and not leaves_node_on)
        if goes and node.is_empty and node.is_on:
            self._switch_off(node)

    # Nodes.

    def _switched_on_for(self, state: _ModelState) -> _Node | None:
        """Switch on the cheapest node that fits, unless enough boot; return it if it need not boot."""
        model = state.model
        for name in sorted(model.starts, key=lambda each: self._fleet.node_class(each).price):
            kind = self._fleet.node_class(name)
            if not problem.fits(model, kind):
                continue
            booting = sum(node.is_booting for node in self._used[name])
            if booting and booting * problem.fits(model, kind) * model.concurrency >= len(state.waiting):
                return None
            for node in self._nodes[name]:
                if not node.is_on and node.since <= self._now:
                    self._switch_on(node, kind.boot_seconds)
                    return None if node.is_booting else node
        return None

    def _switch_on(self, node: _Node, boot_seconds: float) -> None:
        node.is_on, node.since = True, self._now
        node.is_booting = boot_seconds > 0
        self._used[node.kind.name][node] = None
        if node.is_booting:
            self._at(self._now + boot_seconds, _Kind.NODE_READY, node)

    def _keep(self, node: _Node, model: ServedModel) -> None:
        node.keep(model)
        self._holders[model.name][node] = None

    def _switch_off(self, node: _Node) -> None:
        seconds = self._now - node.since
        self._cost += node.kind.price * seconds / 3600
        self._paid_gpus += seconds * max(1, node.kind.gpus)
        node.is_on = node.is_booting = node.is_draining = False
        for name in node.images:
            self._holders[name].pop(node, None)
        node.images = {}
        self._used[node.kind.name].pop(node, None)

    def _begin_period(self, period: int) -> None:
        policy = self._policy
        self._period = period
        for name, state in self._models.items():
            state.warm = policy.warm[period].get(name, 0)
            state.home = policy.classes[period].get(name) if policy.classes else None
        self._begin_period_nodes()
        if policy.nodes is not None:
            self._drain_nodes(policy.nodes[period])
        self._keep_warm()
        for state in self._models.values():
            if policy.idle_seconds < math.inf:
                spare = [each for each in state.free if not each.busy and each.is_ready]
                for replica in spare[: max(0, len(state.replicas) - state.warm)]:
                    self._retire(replica)
        self._start_waiting()

    def _keep_warm(self) -> None:
        for state in self._models.values():
            while len(state.replicas) < state.warm and self._start(state):
                pass

    def _begin_period_nodes(self) -> None:
        """Switch on the nodes that the policy wants now, ahead in time, and put images on them."""
        wanted = self._policy.nodes
        if wanted is None:
            return
        for name, count in wanted[self._period].items():
            off = (node for node in self._nodes[name] if not node.is_on and node.since <= self._now)
            for node in itertools.islice(
                off, max(0, count - sum(not each.is_draining for each in self._used[name]))
            ):
                self._switch_on(node, 0.0)
                self._cost += node.kind.price * (node.kind.boot_seconds if self._now else 0.0) / 3600
        for model_name, count in (self._policy.copies[self._period] if self._policy.copies else {}).items():
            state = self._models[model_name]
            nodes = list(self._used.get(state.home or "", ()))
            missing = count - sum(model_name in node.images for node in nodes)
            for node in sorted(nodes, key=lambda each: sum(each.images.values())):
                if missing > 0 and model_name not in node.images:
                    self._keep(node, state.model)
                    missing -= 1

    def _drain_nodes(self, wanted: Mapping[str, int]) -> None:
        """Let the emptiest nodes beyond those that are wanted go off once their replicas are done."""
        for name, count in wanted.items():
            active = [node for node in self._used[name] if not node.is_draining]
            active.sort(key=lambda node: sum(map(len, node.replicas.values())))
            for node in active[: max(0, len(active) - count)]:
                node.is_draining = True
                for replica in [each for together in node.replicas.values() for each in together]:
                    self._retire(replica)
                if node.is_on and node.is_empty:
                    self._switch_off(node)

    def _next_failure(self, node: _Node) -> None:
        hours = self._random.expovariate(1 / node.kind.hours_between_failures)
        self._at(self._now + hours * 3600, _Kind.FAILURE, node)

    def _fail(self, node: _Node) -> None:
        """Lose a node: what its replicas were serving waits again, from now."""
        self._next_failure(node)
        if not node.is_on:
            return
        self._failures += 1
        for replica in [each for together in node.replicas.values() for each in together]:
            replica.model.waiting.extend([self._now] * replica.busy)
            replica.busy = 0
            if replica.retires:
                self._release(replica)
            else:
                self._retire(replica)
        if node.is_on:
            self._switch_off(node)
        node.since = self._now + node.kind.repair_seconds
        self._at(node.since, _Kind.REPAIRED, node)
        self._begin_period_nodes()
        self._keep_warm()
        self._start_waiting()


def simulate(fleet: Fleet, policy: ScalingPolicy, seed: int) -> Simulated:
    """Simulate all periods of a fleet under a policy; the same seed gives the same outcome."""
    return _Simulation(fleet, policy, seed).run()
