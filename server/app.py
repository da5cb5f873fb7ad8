"""The ASGI application: routes, errors, and the workers' life inside the application's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from server import errors
from server.admin import Admin
from server.answer_headers import AnswerHeaders
from server.auth import Guard, KeyRing
from server.config import Settings
from server.cross_origin import CrossOrigin, HeadAsGet
from server.documents import describe
from server.events import EventLog
from server.gateway import Gateway
from server.limits import Limiter
from server.metrics import Metrics
from server.middleware import Outermost
from server.routes import admin as admin_routes
from server.routes import admin_profiles, console, generate, nodes, ollama, openai, ops, tokens
from server.routes import memory as memory_routes
from server.scheduler.loop import Scheduler
from server.state import State
from server.tracing import Tracing, provider_for
from server.worker.process import DEFAULT_COMMAND


def create_app(
    settings: Settings,
    command: Sequence[str] = DEFAULT_COMMAND,
    config_file: Path | None = None,
    tracing: Tracing | None = None,
    make_scheduler: Callable[[Settings, Metrics, EventLog], Scheduler] | None = None,
    given: Mapping[str, Any] | None = None,
) -> FastAPI:
    """The application; its lifespan starts and ends the workers. `command` replaces the worker's command line,
    `config_file` is what a reload reads, `given` what the command line says instead of it, `tracing` stands for the
    configured one, `make_scheduler` makes the scheduler (a cluster's). Raises StateError and TracingUnavailable."""
    if tracing is None and settings.tracing.enabled:
        tracing = Tracing(provider_for(settings.tracing))
    metrics = Metrics()
    state = State.open(settings.server.state_dir)
    events = EventLog(state)
    make = make_scheduler or (lambda *parts: Scheduler(parts[0], parts[1], command, parts[2]))
    scheduler = make(settings, metrics, events)
    if state.durable and make_scheduler is None:  # a cluster's workers are elsewhere
        scheduler.saved.use(state.folder / "sessions")
    admin = Admin(state, events, scheduler, config_file, given)
    metrics.set_version(ops.installed_version())
    metrics.watch_devices(scheduler.memory.ledger.snapshot)
    events.listeners.append(lambda event: metrics.events.labels(event["kind"], event["model"] or "").inc())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        admin.start()
        scheduler.start()
        try:
            yield
        finally:
            await scheduler.stop()
            await admin.stop()
            state.close()
            if tracing is not None:
                await asyncio.to_thread(tracing.shutdown)

    app = FastAPI(
        title="Spectral",
        version=ops.installed_version(),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # they load their scripts from another host, into the console's own origin
        redoc_url=None,
    )
    app.state.scheduler = scheduler
    app.state.metrics = metrics
    app.state.gateway = Gateway(scheduler, Limiter())
    app.state.admin = admin
    app.state.keys = KeyRing(settings.auth, lambda: scheduler.settings.server)
    app.state.started = int(time.time())
    errors.install(app)
    app.add_middleware(HeadAsGet)
    app.add_middleware(AnswerHeaders)
    app.add_middleware(Guard, keys=app.state.keys, settings=settings.auth)
    app.add_middleware(CrossOrigin, origins=settings.server.allowed_origins)
    app.add_middleware(Outermost, metrics=metrics, tracing=tracing)
    for module in (openai, ollama, generate, tokens, ops, admin_routes, admin_profiles, memory_routes, nodes, console):
        app.include_router(module.router)
    describe(app)
    return app
