# SPDX-License-Identifier: Apache-2.0
"""Test the linear program against ones whose solution is known."""

import pytest

from rekindle.fleet.program import Program


def knapsack() -> Program:
    program = Program()
    # Values 60, 100, 120 with weights 10, 20, 30 into 50: 220 with whole items, 240 with parts.
    items = [program.column(-value, 1.0, integer=True) for value in (60.0, 100.0, 120.0)]
    program.row(dict(zip(items, (10.0, 20.0, 30.0), strict=True)), most=50.0)
    return program


def test_integers() -> None:
    solution = knapsack().solve()
    assert solution is not None
    assert solution.cost == pytest.approx(-220)
    assert solution.bound == pytest.approx(-220)
    assert [round(each) for each in solution.values] == [0, 1, 1]


def test_the_relaxed_program_and_its_prices() -> None:
    solution = knapsack().solve(relaxed=True)
    assert solution is not None
    assert solution.cost == pytest.approx(-240)
    assert solution.values == pytest.approx((1.0, 1.0, 2 / 3))
    assert solution.row_duals == pytest.approx((-4.0,))  # another unit of room is worth 120 / 30
    assert solution.column_duals[0] == pytest.approx(-20.0)


def test_none_if_nothing_satisfies_the_rows() -> None:
    program = Program()
    column = program.column(1.0, upper=1.0)
    program.row({column: 1.0}, least=2.0)
    assert program.solve() is None


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    knapsack().solve()
    assert capfd.readouterr() == ("", "")
