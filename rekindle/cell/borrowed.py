# SPDX-License-Identifier: Apache-2.0
"""A cell that another rekindle holds and lends to us.

Both have its control socket meanwhile, but only one may use it. The lender goes on where the borrower
stopped: it learns from `exits` which processes ended. A borrower that is killed changes nothing: the cell is
not its own, and CRIU, which waits for its decision, lets the processes run on.
"""

import socket
from collections.abc import Callable
from types import TracebackType
from typing import Self

from msgspec import Struct

from rekindle.cell import Cell, Clocks
from rekindle.errors import RestoreError

_ANSWER_SECONDS = 20.0


class LentCell(Struct, frozen=True, kw_only=True):
    """A cell in a message; its control socket comes with it, and the second one for a private network."""

    init: int
    monotonic_ns: int
    boottime_ns: int
    has_network: bool


def lend(cell: Cell) -> tuple[LentCell, list[int]]:
    """Return a cell in the form of a message, and the descriptors to send with it."""
    lent = LentCell(
        init=cell.init_pid,
        monotonic_ns=cell.clocks_offset.monotonic_ns,
        boottime_ns=cell.clocks_offset.boottime_ns,
        has_network=cell.has_own_network,
    )
    return lent, cell.descriptors()


class BorrowedCell(Cell):
    """A cell of another process, until it is given back. Ending it only gives it back.

    Sockets in its network come from the lender, who may serve on meanwhile, by `dial`.
    """

    def __init__(
        self, lent: LentCell, fds: list[int], dial: Callable[[socket.AddressFamily], socket.socket]
    ) -> None:
        self._reset()
        self._ask_lender = dial
        self._init = lent.init
        self._control = socket.socket(fileno=fds[0])
        if lent.has_network:
            self._dial = socket.socket(fileno=fds[1])
            self._dial.settimeout(_ANSWER_SECONDS)  # the lender has made it non-blocking
        self.clocks_offset = Clocks(monotonic_ns=lent.monotonic_ns, boottime_ns=lent.boottime_ns)

    @property
    def exits(self) -> dict[int, int]:
        """The wait statuses of the processes that ended meanwhile, by their PIDs in the cell."""
        return self._exits

    @property
    def launcher_pid(self) -> int:
        raise NotImplementedError("it is a child of the lender")

    def socket(self, family: socket.AddressFamily) -> socket.socket:
        return self._ask_lender(family)

    def end(self) -> None:
        self._control.close()
        if self._dial is not None:
            self._dial.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def _ended(self) -> RestoreError:
        return RestoreError("the cell of the replica has ended")
