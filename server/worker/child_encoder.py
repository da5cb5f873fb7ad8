"""A worker's thread for what a request needs before it begins and what may take seconds: a long prompt's tokens, a new
grammar, and the chat's cache where it lies in a file."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from server.worker import child_wire
from server.worker import messages as wire
from server.worker.child_queue import TurnQueue
from spectral.engine import types

if TYPE_CHECKING:
    from server.worker.child_engines import Engines
    from server.worker.child_saved import Found, SavedChats


@dataclass(frozen=True)
class Encoded:
    """A prompt's token ids, or why there are none; and the cache that its chat goes on from, if a file had one."""

    request: types.GenerateRequest
    outcome: list[int] | Exception
    found: Found | None = None


class Encoder:
    """Tokenizes long prompts, compiles new grammars, and reads the saved sessions of requests, tenants in turn; the
    outcome comes into the inbox. Answers Tokenize by itself."""

    def __init__(
        self,
        engines: Engines,
        saved: SavedChats,
        done: Callable[[Encoded], None],
        send: Callable[..., None],
    ) -> None:
        self._engines, self._saved, self._done, self._send = engines, saved, done, send
        self._requests: TurnQueue[types.GenerateRequest | wire.Tokenize] = TurnQueue()
        threading.Thread(target=self._run, name="encoder", daemon=True).start()

    def put(self, request: types.GenerateRequest | wire.Tokenize) -> None:
        """Queue a request; returns at once."""
        self._requests.put(request, request.tenant if isinstance(request, types.GenerateRequest) else "")

    def _run(self) -> None:
        while True:
            request = self._requests.get()
            if isinstance(request, wire.Tokenize):
                self._send(self._tokenize(request))
                continue
            outcome: list[int] | Exception
            try:
                outcome = self._engines.current.encode(request)
            except Exception as error:  # told to the client by the inference thread
                outcome = error
            found = None if isinstance(outcome, Exception) else self._saved.read(request)
            self._done(Encoded(request, outcome, found))

    def _tokenize(self, message: wire.Tokenize) -> wire.ToParent:
        try:
            ids = self._engines.current.count(child_wire.to_encode(message))
            return child_wire.tokenized(message.request_id, ids, self._engines.current.loaded.tokenizer)
        except Exception as error:  # a tokenizer or template that breaks on one text must not end the others
            return child_wire.rejected(message.request_id, error)
