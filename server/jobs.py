"""Profiling jobs: `spectral profile build` in a child process, one at a time, with progress and cancel."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import sys
import time
import uuid
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server import errors, state_tables
from server.aio import within
from server.child_env import child_environment
from server.config import ModelSettings
from server.events import EventLog
from server.profiles import ProfileStore
from server.state import State
from server.state_schema import StateUnusable

log = logging.getLogger("spectral.jobs")
MAX_WAITING = 8
TERMINATE_S = 10.0
SAID_LINES = 40
BUILD_COMMAND = (sys.executable, "-m", "server.profile_child", "build")
OVER = ("done", "failed", "cancelled", "interrupted")


@dataclass
class Job:
    """One build. `state`: queued, running, done, failed, cancelled or interrupted (the server ended)."""

    id: str
    model: str
    options: dict[str, Any]
    state: str = "queued"
    created: float = field(default_factory=time.time)
    finished: float | None = None
    sha256: str | None = None
    message: str = ""
    stage: str = ""
    fraction: float = 0.0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def row(self) -> dict[str, Any]:
        """What the state keeps."""
        names = ("id", "model", "state", "options", "created", "finished", "sha256", "message")
        return {name: getattr(self, name) for name in names}

    def view(self) -> dict[str, Any]:
        """What a client sees."""
        return {**self.row(), "stage": self.stage, "fraction": round(self.fraction, 4)}

    def update(self, **values: Any) -> None:
        """Set fields and wake those who watch."""
        for name, value in values.items():
            setattr(self, name, value)
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """The queue of builds."""

    def __init__(self, state: State, store: ProfileStore, events: EventLog) -> None:
        self._state, self._store, self._events = state, store, events
        self._folder = state.folder / "builds"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        self._live: dict[str, Job] = {}
        self._queue: deque[tuple[Job, ModelSettings]] = deque()
        self._child: asyncio.subprocess.Process | None = None
        self._running: Job | None = None
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Begin to work on the queue."""
        self._task = asyncio.create_task(self._work(), name="profiling jobs")

    async def stop(self) -> None:
        """End the running build; its checkpoint stays."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for job in self._live.values():
            if job.state not in OVER:
                await self._over(job, "interrupted", "the server ended")

    async def submit(self, settings: ModelSettings, options: dict[str, Any]) -> Job:
        """Queue a build. Raises ApiError 429 where too many wait."""
        if len(self._queue) >= MAX_WAITING:
            raise errors.queue_full(f"{MAX_WAITING} profiling jobs wait already")
        job = Job(uuid.uuid4().hex[:12], settings.name, options)
        self._live[job.id] = job
        await self._save(job)
        self._queue.append((job, settings))
        self._wake.set()
        return job

    def find(self, ident: str) -> Job:
        """A job of this run of the server. Raises ApiError 404."""
        if ident not in self._live:
            message = f"there is no job {errors.shorten(ident, 40)!r} of this run; GET /admin/jobs lists all"
            raise errors.ApiError(404, message, code="job_not_found")
        return self._live[ident]

    async def rows(self) -> list[dict[str, Any]]:
        """All jobs, newest first, those of earlier runs included."""
        rows = await self._state.run(state_tables.jobs)
        return [self._live[row["id"]].view() if row["id"] in self._live else row for row in rows]

    async def cancel(self, ident: str) -> Job:
        """End a job; one that is over stays as it is. Its checkpoint is kept."""
        job = self.find(ident)
        if job.state in OVER:
            return job
        job.update(state="cancelled", finished=time.time(), message="cancelled by an administrator")
        await self._save(job)
        if job is self._running and self._child is not None:
            await self._end(self._child)
        return job

    async def _save(self, job: Job) -> None:
        await self._state.run(lambda db: state_tables.put_job(db, job.row()))

    async def _work(self) -> None:
        while True:
            while not self._queue:
                self._wake.clear()
                await self._wake.wait()
            job, settings = self._queue.popleft()
            if job.state != "queued":
                continue
            self._running = job
            try:
                await self._run(job, settings)
            except errors.ApiError as error:
                await self._over(job, "failed", error.message)
            except Exception as error:  # the next job must not suffer from this one
                log.exception("profiling job %s", job.id)
                await self._over(job, "failed", f"{type(error).__name__}: {error}")
            finally:
                self._running = None

    async def _over(self, job: Job, state: str, message: str = "", sha256: str | None = None) -> None:
        if job.state not in OVER:
            job.update(state=state, finished=time.time(), message=message, sha256=sha256)
            try:
                await self._save(job)
            except StateUnusable as error:  # the next job must not suffer from a full disk
                log.error("job %s is %s, which cannot be kept: %s", job.id, state, error)
        self._events.add("profile_build", f"{job.state}: {job.message}".rstrip(": "), model=job.model, job=job.id)

    def _output(self, job: Job) -> Path:
        """The same options, the same file: so a build goes on from the checkpoint of one that was ended."""
        key = json.dumps([job.model, job.options], sort_keys=True)
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"

    async def _run(self, job: Job, settings: ModelSettings) -> None:
        output = self._output(job)
        command = [*BUILD_COMMAND, *build_arguments(settings, job.options)]
        child = await asyncio.create_subprocess_exec(
            *command,
            "--output",
            str(output),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(OMP_WAIT_POLICY="PASSIVE", OMP_NUM_THREADS=str(settings.threads)),
            start_new_session=True,
        )
        self._child = child
        job.update(state="running", stage="starting")
        said: deque[str] = deque(maxlen=SAID_LINES)
        try:
            await self._save(job)
            await self._follow(job, child, said)
            status = await child.wait()
        finally:
            self._child = None
            await self._end(child)
        if job.state != "running":
            await self._over(job, job.state)
            return
        if status != 0:
            await self._over(job, "failed", said[-1] if said else f"the build ended with status {status}")
            return
        job.update(stage="publishing", fraction=1.0)
        published = await self._store.publish(job.model, output, "build")
        await self._over(job, "done", sha256=published["sha256"])

    async def _follow(self, job: Job, child: asyncio.subprocess.Process, said: deque[str]) -> None:
        assert child.stderr is not None
        while True:
            try:
                line = (await child.stderr.readline()).decode("utf-8", "replace")
            except ValueError:  # longer than the reader's buffer: asyncio has dropped it
                continue
            if not line:
                return
            step = progress_of(line)
            if step is not None:
                job.update(stage=step[0], fraction=step[1])
            elif line.strip():
                said.append(line.strip())

    async def _end(self, child: asyncio.subprocess.Process) -> None:
        if child.returncode is not None:
            return
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            await within(TERMINATE_S, child.wait())
        except asyncio.TimeoutError:
            child.kill()
            await child.wait()


def build_arguments(settings: ModelSettings, options: dict[str, Any]) -> list[str]:
    """The command's arguments for a model as it is configured."""
    quantize = {"nf4": ["--quantize", "4bit"], "int8": ["--quantize", "8bit"], "none": []}[settings.quantization]
    device = options.get("device") or settings.device
    numbers = ["--tokens", str(options["tokens"]), "--seed", str(options["seed"]), "--prefer", options["prefer"]]
    return [settings.path, *numbers, "--device", device, *quantize, "--progress", "json"]


def progress_of(line: str) -> tuple[str, float] | None:
    """Stage and fraction from a line of progress; None for any other line."""
    if not line.startswith('{"stage"'):
        return None
    try:
        step = json.loads(line)
        return str(step["stage"]), float(step["fraction"])
    except (ValueError, LookupError, TypeError):
        return None
