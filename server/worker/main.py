"""A model's process: `python -m server.worker.main --fd N`, started by the gateway and never by hand.

The main thread loads the model and runs the engine; with nothing to do it waits for its inbox. Beside it:
    reader   answers pings at once, however long a step takes, and ends the process when the gateway is gone
    writer   sends what the gateway does not take at once
    encoder  tokenizes long prompts, compiles new grammars and reads saved sessions, which may take seconds, while the
             engine goes on
    profile  reads another profile, while requests go on under the one before

Exit statuses: 0 after Shutdown (sessions are saved then), or when the gateway closed its end; 1 if the inference thread
failed; 2 on bytes that are no message; 3 if the model cannot be loaded; 4 if its weights were damaged while they slept.
"""

from __future__ import annotations

import argparse
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from server.worker.allocator import prepare_allocator

# Before torch is imported by anything: an OpenMP pool that spins would take the cores from other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    prepare_allocator()

from server import heap
from server.worker import child_sessions, child_wire
from server.worker import messages as wire
from server.worker.channel import SocketChannel
from server.worker.child_encoder import Encoded, Encoder
from server.worker.child_engines import Change, Engines, Preparation
from server.worker.child_load import import_libraries, load
from server.worker.child_memory import COMMANDS, MemoryControl
from server.worker.child_queue import QueueDeadlines
from server.worker.child_saved import Found, SavedChats
from spectral.engine import types
from spectral.engine.chat import opens_thoughts, thought_format
from spectral.errors import ModelError, ProfileError, RequestError, SettingError

log = logging.getLogger("spectral.worker")

SWITCH_S = 0.0005
"""After how long a thread lets another one run, usually 5 ms. Every call into torch gives the interpreter away, and the
inference thread would wait so long for it each time while settings are foreseen, prompts tokenized or profiles read."""

STATS_EVERY_S = 0.25
IDLE_TRIM_S = 5.0

EXIT_OK, EXIT_DIED, EXIT_BAD_FRAME, EXIT_LOAD_FAILED = 0, 1, 2, 3


Inbox = queue.SimpleQueue["wire.ToWorker | Encoded | Change | Preparation"]


class Writer:
    """Sends messages. What the socket takes at once is sent at once: waking a thread for every token would cost the
    inference thread more than the write does. The rest goes to a thread of its own, so that a slow gateway does not
    hold up a step."""

    def __init__(self, channel: SocketChannel) -> None:
        self._channel = channel
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._order = threading.Lock()
        self._waiting = 0  # items of the outbox that are not sent yet
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self._thread.start()

    def send(self, *messages: wire.ToParent) -> None:
        """Send messages in the order of the calls; never waits for the gateway."""
        if not messages:
            return
        with self._order:
            if self._waiting:
                rest = b"".join(wire.encode(message) for message in messages)
            else:
                try:
                    rest = self._channel.send_at_once(*messages)
                except OSError:
                    os._exit(EXIT_OK)  # the gateway is gone; there is nobody to work for
            if rest:
                self._waiting += 1
                self._outbox.put(rest)

    def finish(self, timeout_s: float = 5.0) -> None:
        """Send what is queued and stop."""
        self._outbox.put(None)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (data := self._outbox.get()) is not None:
            try:
                self._channel.send_bytes(data)
            except OSError:
                os._exit(EXIT_OK)
            with self._order:
                self._waiting -= 1


class Reader:
    """Receives messages: pings are answered here, everything else goes to the inbox, unless `early` takes it, which
    does not wait for the end of a step."""

    def __init__(self, channel: SocketChannel, writer: Writer) -> None:
        self.inbox: Inbox = queue.SimpleQueue()
        self.early: Callable[[wire.ToWorker], bool] = lambda message: False
        self._channel, self._writer = channel, writer
        threading.Thread(target=self._run, name="reader", daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                message = self._channel.receive()
            except wire.BadFrame as error:
                log.error("%s; this worker ends", error)
                os._exit(EXIT_BAD_FRAME)
            except OSError:
                message = None
            if message is None:
                os._exit(EXIT_OK)
            if isinstance(message, wire.Ping):
                self._writer.send(wire.Pong(message.seq))
            elif not self.early(message):
                self.inbox.put(message)


class Worker:
    """The inference thread's loop: messages in, steps, events out."""

    def __init__(self, engines: Engines, inbox: Inbox, writer: Writer, saved: SavedChats | None = None) -> None:
        self._engines, self._inbox, self._writer = engines, inbox, writer
        self._saved = saved or SavedChats(engines, None, "")
        self._translate = child_wire.EventTranslator(engines.current.loaded.tokenizer)
        self._thoughts = thought_format(engines.current.loaded.tokenizer)
        self._encoder = Encoder(engines, self._saved, inbox.put, writer.send)
        self._memory = MemoryControl(engines, engines.current.limits.max_kv_bytes, writer.send)
        self._queue = QueueDeadlines(engines, writer.send)
        self._encoding: dict[str, bool] = {}  # requests at the encoder, and whether they were cancelled meanwhile
        self._preparing: set[str] = set()  # commands whose settings are being prepared
        self._stop_at: float | None = None
        self._trim_at: float | None = None  # when the cache's unused memory is given back
        self._stats_at = 0.0

    def run(self) -> None:
        """Serve until a Shutdown's work is done or its deadline has passed; then save sessions."""
        self._report()
        while self._receive():
            if not self._engines.has_work:
                continue
            messages = [self._translate(event) for event in self._engines.step()]
            self._writer.send(*[message for message in messages if message is not None])
            if not self._engines.has_work:
                self._rest()
                self._report()
            elif time.monotonic() >= self._stats_at:
                self._report()
        self._abandon()
        self._report()
        self._saved.save(asleep=self._memory.asleep)

    def _rest(self) -> None:
        """Nothing is left to do: an idle model keeps prefixes only. One whose steps are graphs over its cache's memory
        keeps that for a while: the next request would have to capture them again."""
        if self._engines.current.runner.graphs is None:
            self._engines.trim()
        else:
            self._trim_at = time.monotonic() + IDLE_TRIM_S

    def _next(self) -> wire.ToWorker | Encoded | Change | Preparation:
        """The next message, however long it takes to come."""
        if self._trim_at is not None:
            try:
                return self._inbox.get(timeout=max(0.0, self._trim_at - time.monotonic()))
            except queue.Empty:
                self._trim_at = None
                self._engines.trim()
                self._report()
        return self._inbox.get()

    def _receive(self) -> bool:
        """Handle everything in the inbox, waiting for it if there is nothing else to do. False: the work is over."""
        if not self._engines.has_work and self._inbox.empty():
            if self._stop_at is None:
                self._handle(self._next())
            elif self._encoding or self._preparing:
                try:
                    self._handle(self._inbox.get(timeout=max(0.0, self._stop_at - time.monotonic())))
                except queue.Empty:
                    return False
        while not self._inbox.empty():
            self._handle(self._inbox.get())
        if self._stop_at is None:
            return True
        return time.monotonic() < self._stop_at and (self._engines.has_work or bool(self._encoding or self._preparing))

    def _handle(self, message: wire.ToWorker | Encoded | Change | Preparation) -> None:
        if isinstance(message, wire.Submit):
            self._queue.add(message)
            self._submit(message)
        elif isinstance(message, wire.Tokenize):
            self._encoder.put(message)
        elif isinstance(message, wire.Cancel):
            if message.request_id in self._encoding:
                self._encoding[message.request_id] = True
            self._engines.cancel(message.request_id)
        elif isinstance(message, Encoded):
            if isinstance(message.outcome, list) and not self._engines.current.knows(message.request.params.grammar):
                self._encoder.put(message.request)  # another profile's engine compiled it
            else:
                self._start(message.request, message.outcome, message.found)
        elif isinstance(message, wire.SetProfile):
            Change(message, self._engines, self._inbox.put)
        elif isinstance(message, Change):
            self._writer.send(*message.apply())
            self._report()
        elif isinstance(message, Preparation):
            self._preparing.discard(message.command.command_id)
            self._writer.send(*self._memory.handle(message.command, message))
            self._report()
        elif isinstance(message, COMMANDS):
            if not self.prepare(message):
                self._writer.send(*self._memory.handle(message))
                self._report()
        elif isinstance(message, child_sessions.COMMANDS):
            self._writer.send(child_sessions.handle(self._engines, message))
        elif isinstance(message, wire.Shutdown):
            self._stop_at = time.monotonic() + message.deadline_s
        else:
            log.warning("a %s message came after loading and is ignored", type(message).__name__)

    def prepare(self, message: wire.ToWorker) -> bool:
        """Where a setting is asked for while requests run, begin to make what it needs; whether it is so. The reader
        asks first: the inference thread looks at its inbox at the end of a step only."""
        if not isinstance(message, wire.SetSetting) or not self._engines.has_work:
            return False
        self._preparing.add(message.command_id)
        Preparation(message, self._engines, self._inbox.put)
        return True

    def _submit(self, message: wire.Submit) -> None:
        ident = message.request_id
        if self._stop_at is not None:
            self._writer.send(wire.Rejected(ident, 503, "shutting_down", "this model is shutting down"))
            return
        if self._memory.asleep:
            self._writer.send(wire.Rejected(ident, 503, "asleep", "this model sleeps; send the request again"))
            return
        try:
            request = child_wire.to_request(message)
            if ident in self._encoding:
                raise RequestError(f"request_id {ident!r} is in use", param="request_id")
            engine = self._engines.current
            known = engine.knows(request.params.grammar)
            if child_wire.takes_long(message) or not known or self._saved.waits(request):
                self._encoding[ident] = False
                self._encoder.put(request)
                return
            outcome: list[int] | Exception = engine.encode(request)
        except RequestError as error:
            self._writer.send(child_wire.rejected(ident, error))
            return
        except Exception as error:  # a tokenizer or template that breaks on one prompt must not end the others
            log.exception("request %s could not be prepared", ident)
            outcome = error
        self._start(request, outcome)

    def _start(
        self, request: types.GenerateRequest, outcome: list[int] | Exception, found: Found | None = None
    ) -> None:
        ident = request.request_id
        cancelled = self._encoding.pop(ident, False)
        if self._saved.begin(request, found):
            self._report()
        try:
            if isinstance(outcome, Exception):
                raise outcome
            engine = self._engines.current
            tokens = engine.submit(request, outcome)
            setting = engine.lanes.setting_for(request.max_kl, request.setting)
            thinks = request.is_chat and opens_thoughts(engine.loaded.tokenizer, self._thoughts, outcome)
        except Exception as error:  # as above
            self._writer.send(child_wire.rejected(ident, error))
            return
        self._translate.clock.submitted(ident, request.params.n)
        self._writer.send(wire.Accepted(ident, tokens, setting, thinks))
        if cancelled:
            self._engines.cancel(ident)

    def _abandon(self) -> None:
        """The deadline passed: what is left fails."""
        reason = "this model is shutting down"
        for ident in self._engines.live:
            self._engines.cancel(ident)
            self._writer.send(wire.Failed(ident, reason, "shutting_down"))
        for ident in self._encoding:
            self._writer.send(wire.Rejected(ident, 503, "shutting_down", reason))

    def _report(self) -> None:
        self._queue.look()
        self._stats_at = time.monotonic() + STATS_EVERY_S
        figures = self._engines.stats()
        if self._memory.asleep:  # what is kept of the cache is in host memory
            figures = replace(figures, kv_bytes_allocated=0)
        self._writer.send(child_wire.stats(figures, *self._memory.watch(figures.kv_bytes_allocated)))


def serve(channel: SocketChannel, ahead: bool = False) -> int:
    """Run the whole life of a worker on a channel; returns its exit status. `ahead`: import everything before the first
    message comes."""
    writer = Writer(channel)
    reader = Reader(channel, writer)
    if ahead:
        import_libraries()
    first = reader.inbox.get()
    if isinstance(first, wire.Shutdown):
        return EXIT_OK
    if not isinstance(first, wire.Load):
        log.error("the first message must be Load, got %s", type(first).__name__)
        return EXIT_BAD_FRAME
    os.environ.setdefault("OMP_NUM_THREADS", str(first.threads))
    try:
        import torch

        torch.set_num_threads(max(1, first.threads))
        built, ready = load(first, writer.send)
    except Exception as error:  # whatever loading raises is reported to the gateway, which decides what to do
        log.exception("%s could not be loaded", first.name)
        permanent = isinstance(error, (ModelError, ProfileError, SettingError, RequestError))
        message = str(error) if permanent else f"{type(error).__name__}: {error}"
        writer.send(wire.LoadFailed(message, permanent))
        writer.finish()
        return EXIT_LOAD_FAILED
    heap.keep()
    sys.setswitchinterval(SWITCH_S)
    writer.send(ready)
    engines = Engines(built)
    worker = Worker(engines, reader.inbox, writer, SavedChats(engines, first.sessions, first.name))
    reader.early = worker.prepare
    worker.run()
    writer.finish()
    return EXIT_OK


def main(argv: list[str] | None = None) -> None:
    """Entry point. Never returns: other threads may be waiting on the socket, so the process is ended."""
    parser = argparse.ArgumentParser(description="A Spectral model worker; the server starts it.")
    parser.add_argument("--fd", type=int, required=True, help="descriptor of the socket to the gateway")
    parser.add_argument("--ahead", action="store_true", help="import all libraries before a model is asked for")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    status = EXIT_DIED
    try:
        status = serve(SocketChannel.from_fd(arguments.fd), arguments.ahead)
    except Exception:  # logged, and told to the gateway by the exit status
        log.exception("the inference thread failed")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
