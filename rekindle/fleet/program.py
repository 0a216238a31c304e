# SPDX-License-Identifier: Apache-2.0
"""A mixed-integer linear program, minimized by HiGHS."""

import math
from collections.abc import Mapping

import highspy
import numpy as np
from msgspec import Struct

from rekindle.errors import CapabilityError

_INFINITY = highspy.kHighsInf


class Solution(Struct, frozen=True, kw_only=True):
    """The values of the columns, the dual values of columns and rows, the cost, and a bound of it.

    The dual values are those of a linear program; a program with integers has none.
    """

    values: tuple[float, ...]
    column_duals: tuple[float, ...]
    row_duals: tuple[float, ...]
    cost: float
    bound: float


class Program:
    """Columns and rows, which are added one by one, and numbered from 0."""

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._uppers: list[float] = []
        self._integers: list[int] = []
        self._rows: list[tuple[float, float]] = []
        self._starts: list[int] = []
        self._columns: list[int] = []
        self._factors: list[float] = []

    def column(self, cost: float = 0.0, upper: float = math.inf, *, integer: bool = False) -> int:
        """Add a column that is at least 0, and return its number."""
        number = len(self._costs)
        self._costs.append(cost)
        self._uppers.append(min(upper, _INFINITY))
        if integer:
            self._integers.append(number)
        return number

    def row(self, factors: Mapping[int, float], *, least: float = -math.inf, most: float = math.inf) -> int:
        """Require that a sum of columns is between two numbers; return the number of the row."""
        self._rows.append((max(least, -_INFINITY), min(most, _INFINITY)))
        self._starts.append(len(self._columns))
        self._columns.extend(factors)
        self._factors.extend(factors.values())
        return len(self._rows) - 1

    def solve(self, *, relaxed: bool = False, gap: float = 0.0, seconds: float = math.inf) -> Solution | None:
        """Minimize the cost; with `relaxed`, of the linear program without integers.

        Returns None if no values satisfy the rows, or none were found in time. Raises CapabilityError if
        HiGHS fails.
        """
        solver = highspy.Highs()  # type: ignore[no-untyped-call]
        solver.setOptionValue("output_flag", False)
        solver.setOptionValue("threads", 1)
        solver.setOptionValue("random_seed", 1)
        solver.setOptionValue("mip_rel_gap", gap)
        if seconds < math.inf:
            solver.setOptionValue("time_limit", seconds)
        count = len(self._costs)
        solver.addVars(count, np.zeros(count), np.array(self._uppers))
        solver.changeColsCost(count, np.arange(count, dtype=np.int32), np.array(self._costs))
        solver.addRows(
            len(self._rows),
            np.array([least for least, _ in self._rows]),
            np.array([most for _, most in self._rows]),
            len(self._columns),
            np.array(self._starts, dtype=np.int32),
            np.array(self._columns, dtype=np.int32),
            np.array(self._factors),
        )
        mixed = bool(self._integers) and not relaxed
        if mixed:
            integers = np.array(self._integers, dtype=np.int32)
            solver.changeColsIntegrality(
                len(integers), integers, np.full(len(integers), highspy.HighsVarType.kInteger)
            )
        if solver.run() == highspy.HighsStatus.kError:
            raise CapabilityError("HiGHS failed", cause=str(solver.getModelStatus()))
        info, solution = solver.getInfo(), solver.getSolution()
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            return None
        return Solution(
            values=tuple(solution.col_value),
            column_duals=() if mixed else tuple(solution.col_dual),
            row_duals=() if mixed else tuple(solution.row_dual),
            cost=info.objective_function_value,
            bound=info.mip_dual_bound if mixed else info.objective_function_value,
        )
