"""Run work in a thread, show what it has so far, and end it: by the visitor, by time, or when nobody looks any more."""

import threading
import time
from collections.abc import Callable, Iterator

from limits import SECONDS, UNREAD_SECONDS

FRAME_SECONDS = 1 / 15


class Halt(Exception):
    """Ends a run from within; what it has so far is its result."""


class Watch:
    """Between one piece of work and whoever reads its results.

    The work calls `post` with what is to be shown and `check` as often as it can; `results` is read from elsewhere.
    """

    def __init__(self, seconds: float = SECONDS):
        self.news, self.latest, self.version, self.ended = threading.Condition(), None, 0, False
        self.error, self.is_closed = None, False
        self.seconds, self.deadline, self.read_at = seconds, float("inf"), time.monotonic()

    def post(self, value) -> None:
        with self.news:
            self.latest, self.version = value, self.version + 1
            self.news.notify_all()

    def check(self) -> None:
        """Raises Halt if the run is to end."""
        now = time.monotonic()
        if self.is_closed or now - self.read_at > UNREAD_SECONDS:
            raise Halt("stopped")
        if now > self.deadline:
            raise Halt("time")

    def results(self, work: Callable[["Watch"], None], lock: threading.Lock) -> Iterator:
        """Do the work while holding the lock; yields the newest of what it posts, and the last in any case.

        Raises what the work raises. Closing the iterator ends the work at its next `check`.
        """
        threading.Thread(target=self._run, args=(work, lock), daemon=True).start()
        seen = 0
        try:
            while True:
                with self.news:
                    while self.version == seen and not self.ended:
                        self.read_at = time.monotonic()
                        self.news.wait(1.0)
                    value, is_new, seen, ended = self.latest, self.version > seen, self.version, self.ended
                if is_new:
                    yield value
                self.read_at = time.monotonic()
                if ended:
                    break
                with self.news:
                    self.news.wait_for(lambda: self.ended, FRAME_SECONDS)
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True

    def _run(self, work, lock) -> None:
        try:
            with lock:
                self.deadline = time.monotonic() + self.seconds
                self.check()
                work(self)
        except Halt:  # nobody is there
            pass
        except BaseException as error:
            self.error = error
        with self.news:
            self.ended = True
            self.news.notify_all()
