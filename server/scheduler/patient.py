"""Reading devices whose driver may hang: the loop that decides about loads waits for a while and no longer."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from server.scheduler.nvml import Reading

log = logging.getLogger("spectral.memory")
READ_S = 2.0


class PatientReader:
    """Reads on a thread. A read that hangs goes on, and there is never a second one beside it."""

    def __init__(self, seconds: float = READ_S) -> None:
        self._seconds = seconds
        self._reading: asyncio.Future[list[Reading]] | None = None
        self._stuck = False

    async def read(self, look: Callable[[], list[Reading]]) -> list[Reading] | None:
        """What `look` returns, or None where there is nothing after `seconds`. Raises what it raises."""
        if self._reading is None:
            self._reading = _on_thread(look)
        reading = self._reading  # another may wait for it too, and be served first
        done, _ = await asyncio.wait({reading}, timeout=self._seconds)
        if not done:
            if not self._stuck:
                log.warning("the devices could not be read within %g s; their last figures are used", self._seconds)
            self._stuck = True
            return None
        if self._reading is reading:
            self._reading, self._stuck = None, False
        return reading.result()


def _on_thread(look: Callable[[], list[Reading]]) -> asyncio.Future[list[Reading]]:
    """Look on a thread that nobody waits for at the end: asyncio's own pool would hold the shutdown up."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[list[Reading]] = loop.create_future()

    def tell(found: list[Reading] | None, error: Exception | None) -> None:
        if not future.done():
            future.set_result(found or []) if error is None else future.set_exception(error)

    def work() -> None:
        found, error = None, None
        try:
            found = look()
        except Exception as failed:  # told to the loop, which logs it
            error = failed
        try:
            loop.call_soon_threadsafe(tell, found, error)
        except RuntimeError:
            log.debug("a reading came after the server's end")

    threading.Thread(target=work, name="devices", daemon=True).start()
    return future
