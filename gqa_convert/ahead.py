"""Compute the next result on another thread while the present one is being used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def computed_ahead(makers: Sequence[Callable[[], T]], ahead: int = 2) -> Iterator[list[Callable[[], T]]]:
    """Yield stand-ins for `makers`, to be called once each and in order.

    While the caller uses one result, up to `ahead` more are made on another thread, so no more than `ahead` + 1 are in
    memory. An exception of a maker is raised by its stand-in; what was not started is dropped at the end.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        started = {n: pool.submit(make) for n, make in enumerate(makers[:ahead])}

        def take(number: int) -> T:
            following = number + ahead
            if following < len(makers):
                started[following] = pool.submit(makers[following])
            return started.pop(number).result()

        try:
            yield [partial(take, number) for number in range(len(makers))]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
