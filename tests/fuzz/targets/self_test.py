"""A target with every way to fail, by the number of the input: the harness's own test."""

from __future__ import annotations

import os
import signal
import time
from random import Random

from tests.fuzz.targets.base import Base


class SelfTest(Base):
    """0: fine, 1: wrong, 2: never ends, 3: never ends and hears no signal, 4: dies, 5: takes all memory."""

    name = "self_test"
    seconds = 0.3
    memory = 64 << 20

    def __init__(self) -> None:
        self.kinds = {str(Random(f"self_test/0/{number}").random()): number for number in range(6)}

    def make(self, random: Random) -> int:
        """Its number."""
        return self.kinds[str(random.random())]

    def check(self, item: int) -> str:
        """Do it, unless this is the first call of a process, which warms up."""
        warm, self.warm = getattr(self, "warm", False), True
        if not warm or item == 0:
            return "accepted"
        assert item != 1
        if item == 3:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        while item in (2, 3):
            time.sleep(0.01)
        if item == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return "accepted" if len(bytearray(1 << 30)) == 0 else "refused"


TARGETS = {"self_test": SelfTest}
