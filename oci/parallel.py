# SPDX-License-Identifier: Apache-2.0
"""Do the same with many things at once, until the first failure."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_all(
    call: Callable[[Item], Result],
    items: Sequence[Item],
    jobs: int,
    *,
    give_up: Callable[[BaseException], object],
) -> list[Result]:
    """Return the result for each item, in order; calls run in up to `jobs` threads.

    Raises the first failure, or an interruption: `give_up` is then called to end the calls under way, before
    they are waited for.
    """
    with ThreadPoolExecutor(max(1, min(jobs, len(items)))) as pool:
        running = [pool.submit(call, item) for item in items]
        try:
            for job in as_completed(running):
                job.result()
            return [job.result() for job in running]
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            give_up(error)
            raise
