"""The gateway as a process: it listens, serves until a signal, and says what it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from server import heap
from server.app import create_app
from server.config import Settings
from server.http_limits import uvicorn_config
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot
from server.state_schema import StateError
from server.tracing import TracingUnavailable

KEEP_ALIVE_S = 120
"""Idle connections are closed after so long: later than clients and proxies give them up (5 to 90 s), or now and then
a request would be sent into a connection that is being closed, and have no answer."""
Reload = Callable[[], Coroutine[Any, Any, None]]
DEFAULT_URL = "http://127.0.0.1:8000"  # where `spectral chat` looks by itself


def _event_loop() -> Callable[[Coroutine[Any, Any, int]], int]:
    """What runs the server: uvloop where it is installed, which takes a third off the time per token."""
    try:
        import uvloop
    except ImportError:  # there is none for Windows
        return asyncio.run
    return uvloop.run


class GracefulServer(uvicorn.Server):
    """uvicorn, but a handled signal ends the program with status 0, and streams still open at the end get an event."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, reload: Reload | None = None) -> None:
        super().__init__(config)
        self._scheduler, self._reload = scheduler, reload
        self._reloading: asyncio.Task[None] | None = None
        self._wanted = False

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Tell the workers to finish while the connections drain."""
        stopping = asyncio.create_task(self._scheduler.stop())
        await super().shutdown(sockets)
        await stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal ends the server in good order; the second one does not wait for running requests."""
        again = self.should_exit
        super().handle_exit(sig, frame)
        if again:
            self._scheduler.hurry()

    def _hang_up(self) -> None:
        """As daemons do: the configuration is read again, and once more where it is being read already."""
        self._wanted = self._reload is not None and not self.should_exit
        if self._wanted and (self._reloading is None or self._reloading.done()):
            self._reloading = asyncio.get_running_loop().create_task(self._read_again())

    async def _read_again(self) -> None:
        while self._wanted and self._reload is not None:
            self._wanted = False
            await self._reload()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGINT, SIGTERM and SIGHUP while serving; what comes after the end is for nobody."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # under nohup it is ignored
            loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)


def run(
    settings: Settings, listener: socket.socket, config_file: Path, given: dict[str, Any], cluster: str | None = None
) -> int:
    """Serve on `listener` until a signal; the exit status. `config_file`: what a reload reads, with `given` instead of
    what it says. `cluster`: "ray" for a gateway of a cluster."""
    make = None
    if cluster is not None:
        from server.cluster.join import ClusterError, join, scheduler_of

        try:
            make = scheduler_of(join(settings))
        except ClusterError as error:
            print(error, file=sys.stderr)
            return 1
    try:
        app = create_app(settings, config_file=config_file, given=given, make_scheduler=make)
    except (StateError, TracingUnavailable) as error:
        print(error, file=sys.stderr)
        return 1
    return _event_loop()(_serve(app, settings, listener))


async def _serve(app: FastAPI, settings: Settings, listener: socket.socket) -> int:
    scheduler: Scheduler = app.state.scheduler
    config = uvicorn_config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=round(settings.server.drain_seconds) + 3,
    )
    server = GracefulServer(config, scheduler, app.state.admin.reload_on_signal)
    announcing = asyncio.create_task(_announce(scheduler, settings, listener))
    heap.keep()
    try:
        await server.serve(sockets=[listener])
    finally:
        announcing.cancel()
        await asyncio.gather(announcing, return_exceptions=True)
        await scheduler.stop()
    return 0


async def _announce(scheduler: Scheduler, settings: Settings, listener: socket.socket) -> None:
    await scheduler.startup_settled()
    host, port = listener.getsockname()[:2]
    # A client cannot connect to "any address"; the loopback one is always among them.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    print(banner(scheduler, settings, f"http://{shown}:{port}"), flush=True)


def banner(scheduler: Scheduler, settings: Settings, url: str) -> str:
    """What the server says when it is ready: where, what is loaded, how to try it."""
    lines = [f"Spectral is listening on {url}", ""]
    lines += [_describe(slot) for slot in scheduler.slots.values()]
    first = next((slot for slot in scheduler.slots.values() if slot.state == "hot"), None)
    name = first.name if first is not None else settings.models[0].name
    question = {"role": "user", "content": "What is the capital of France?"}
    body = json.dumps({"model": name, "messages": [question], "stream": True})
    lines += ["", "Try it:", f"  curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"]
    chat = "spectral chat" if url == DEFAULT_URL else f"spectral chat --url {url}"
    return "\n".join([*lines, f"  {chat}", ""])


def _describe(slot: Slot) -> str:
    ready = slot.ready
    if ready is None:
        why = f": {slot.error}" if slot.error else (", loaded on first use" if slot.state == "cold" else "")
        return f"  {slot.name}: {slot.state}{why}"
    ratio = ready.bytes_per_token_exact / ready.bytes_per_token if ready.bytes_per_token else 1.0
    cache = f"cache {ratio:.1f}x smaller than bf16 at {ready.reference_context} tokens, KL {ready.kl_mean:.4f}"
    if ready.setting == "exact":
        cache = f"cache not compressed, {ready.bytes_per_token:.0f} bytes per token"
    return (
        f"  {slot.name}: hot on {ready.device}, setting {ready.setting} ({cache}), "
        f"context {ready.context_length} tokens, weights {ready.weights_bytes / 2**20:.1f} MiB"
    )
