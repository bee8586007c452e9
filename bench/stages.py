"""Seconds by stage of a run: functions of the networks and of the sampler, replaced by clocks while it lasts."""

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import contextmanager

STAGES = ("denoiser", "projection", "draw", "energy", "rest")
Target = tuple[object, str, str]  # owner, name of the function there, stage


class Clocks:
    """A stage has no seconds of the stages that it calls, but for the energy, whose projection and all else is its own.

    `wait()` precedes every look at the clock.
    """

    def __init__(self, wait: Callable[[], None]):
        self.wait, self.calls = wait, Counter()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._running = ["rest"]
        self.wait()
        self._since = time.perf_counter()

    def lap(self) -> None:
        """The time since the last lap goes to the stage that runs now."""
        self.wait()
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def timed(self, function: Callable, stage: str) -> Callable:
        @functools.wraps(function)
        def clocked(*args, **kwargs):
            if self._running[-1] == "energy":
                return function(*args, **kwargs)
            self.lap()
            self._running.append(stage)
            self.calls[stage] += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.lap()
                self._running.pop()

        return clocked


@contextmanager
def clocks(targets: Iterable[Target], wait: Callable[[], None]):
    """Time the targets (of a module, a class or an object); afterwards they are what they were."""
    replaced = []
    running = Clocks(wait)
    try:
        for owner, name, stage in targets:
            replaced.append((owner, name, name in vars(owner), getattr(owner, name)))
            setattr(owner, name, running.timed(getattr(owner, name), stage))
        yield running
        running.lap()
    finally:
        for owner, name, was_own, function in reversed(replaced):
            if was_own:
                setattr(owner, name, function)
            else:  # it came from the class
                delattr(owner, name)
