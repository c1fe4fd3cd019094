"""The time that a search may take."""

import time

from tf_lyapunov.local.around import OutOfTime


class Clock:
    """Seconds since it was made, and whether they are used up.

    Args:
        timeout: positive number of seconds, possibly infinite.
    """

    def __init__(self, timeout):
        self.timeout, self.begin = float(timeout), time.monotonic()
        self.deadline = self.begin + self.timeout

    def passed(self):
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    def is_up(self):
        """Whether the time is used up."""
        return time.monotonic() > self.deadline

    def check(self):
        """Raises `OutOfTime` if it is."""
        if self.is_up():
            raise OutOfTime
