"""Compute results on other threads: the next ones while the present one is being used, or several together."""

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


def computed_together(
    makers: Sequence[Callable[[], T]], together: int, on_failure: Callable[[], object] = lambda: None
) -> Iterator[T]:
    """Yield what `makers` make, in order, up to `together` of them being made at a time.

    The first exception is raised in its place; what was not started then is dropped, what was is waited for, after
    `on_failure` has been called to make that short.
    """
    with ThreadPoolExecutor(together, thread_name_prefix="together") as pool:
        futures = [pool.submit(make) for make in makers]
        try:
            for future in futures:
                yield future.result()
        except BaseException:
            on_failure()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
