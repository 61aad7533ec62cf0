import time

import torch


def test_a_processors_seconds_do_not_run_while_it_sleeps() -> None:
    from stopwatch import Stopwatch

    work, clock = Stopwatch("cpu"), Stopwatch("auto")
    time.sleep(0.3)
    assert clock.seconds >= 0.3
    assert work.seconds < 0.15
    assert work.share < 0.5


def test_threads_share_the_work() -> None:
    from stopwatch import Stopwatch

    threads = torch.get_num_threads()
    watch = Stopwatch("cpu")
    started = time.process_time()
    while time.process_time() - started < 0.2:
        pass
    assert watch.seconds >= 0.2 / threads
