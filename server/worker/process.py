"""The parent's side of a worker: start it, talk to it, forward what it prints, end it by its pid."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from server.aio import within
from server.child_env import without_configuration
from server.worker import messages
from server.worker.channel import MessageReader

log = logging.getLogger("spectral.worker")
TERMINATE_S = 2.0
DEFAULT_COMMAND = (sys.executable, "-m", "server.worker.main")


class WorkerProcess:
    """One child process and the socket to it. Made by :meth:`start`; not used again after :meth:`stop`."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.name = name
        self._process = process
        self._messages = MessageReader(reader)
        self._writer = writer
        self._log_task = asyncio.create_task(self._forward_log())

    @classmethod
    async def start(cls, name: str, threads: int, command: Sequence[str] = DEFAULT_COMMAND) -> WorkerProcess:
        """Spawn `command --fd N`. In a session of its own: Ctrl-C in the terminal reaches the gateway only."""
        ours, theirs = socket.socketpair()
        env = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        env.setdefault("MALLOC_ARENA_MAX", "2")  # an arena for each thread keeps what the others could use
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # so that cuda:N is the device that NVML calls N
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                "--fd",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=without_configuration(env),
                start_new_session=True,
            )
            reader, writer = await asyncio.open_connection(sock=ours)
        except BaseException:  # a cancellation too: a child that was started sees the closed socket and ends
            ours.close()
            raise
        finally:
            theirs.close()
        return cls(name, process, reader, writer)

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the child has not ended, as far as is known."""
        return self._process.returncode is None

    async def ended(self) -> None:
        """Return when the child has ended."""
        await self._process.wait()

    def cpu_seconds(self) -> float:
        """Processor time that the child has used; 0 where it has ended, or where that cannot be known."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
            return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError, IndexError):
            return 0.0

    def send(self, message: messages.ToWorker) -> None:
        """Queue a message. A worker that has ended ignores it; the reader reports the end."""
        if not self._writer.is_closing():
            messages.write_message(self._writer, message)

    async def receive(self) -> list[messages.ToParent]:
        """The messages that have come, at least one; none when the worker ended. Raises BadFrame."""
        return await self._messages.take()

    async def stop(self, grace_s: float) -> str:
        """End the child: close the socket, wait `grace_s`, then terminate, then kill. Returns how it ended.

        Whoever cancels this has no more time: the child is killed at once, for a worker must not outlive its server.
        """
        self._writer.close()
        try:
            if not await self.ended_within(grace_s):
                self._signal(signal.SIGTERM)
                await self.ended_within(TERMINATE_S)
        finally:
            self.kill()
            await self._process.wait()
        await asyncio.wait({self._log_task}, timeout=1.0)
        self._log_task.cancel()
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"status {code}"

    def kill(self) -> None:
        """End the child now; nothing happens where it has ended."""
        self._signal(signal.SIGKILL)

    async def ended_within(self, seconds: float) -> bool:
        """True where the child ends within this time."""
        try:
            await within(seconds, self._process.wait())
        except asyncio.TimeoutError:
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            try:
                self._process.send_signal(number)
            except ProcessLookupError:
                log.debug("[%s] had already ended", self.name)

    async def _forward_log(self) -> None:
        assert self._process.stdout is not None
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line longer than the reader's buffer: asyncio has dropped it
                continue
            if not line:
                return
            log.info("[%s] %s", self.name, line.decode("utf-8", "replace").rstrip())
