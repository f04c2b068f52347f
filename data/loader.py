"""Training batches, generated in advance by threads so that no training step waits for data."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from data import Samples


def prefetch(make: Callable[[int, int], Samples], ranges: list[tuple[int, int]], workers: int, depth: int) -> Iterator[Samples]:
    """`make(start, stop)` for each range, in order.

    Args:
        workers: threads that make batches; 0: make each batch when it is needed.
        depth: batches that each thread keeps ready.
    """
    if workers == 0:
        yield from (make(start, stop) for start, stop in ranges)
        return
    executor = ThreadPoolExecutor(workers, thread_name_prefix="data")
    try:
        waiting: deque[Future[Samples]] = deque()
        for start, stop in ranges:
            waiting.append(executor.submit(make, start, stop))
            if len(waiting) > workers * depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
