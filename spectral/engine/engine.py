"""The engine: requests in, events out, one step at a time."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from spectral.engine.answer import Answer
from spectral.engine.chat import check_length, encode_prompt
from spectral.engine.detokenize import longest_token, make_decoder
from spectral.engine.faults import Faults
from spectral.engine.grammar import GrammarCompiler
from spectral.engine.graphs import decode_graphs
from spectral.engine.lanes import Lanes
from spectral.engine.runner import Runner
from spectral.engine.sampler import BROKEN, SamplerState
from spectral.engine.scheduler import Part, Scheduler, chunk_length
from spectral.engine.sequence import Sequence
from spectral.engine.sessions import Sessions
from spectral.engine.types import (
    EngineLimits,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Grammar,
    Logprob,
    PromptLogprobs,
    Started,
    Usage,
)
from spectral.engine.upkeep import check, context_for, effective_context, figures, warm_up
from spectral.errors import BrokenNumbers, CacheError, ContextLengthExceeded, DeadlineExceeded, QueueFull, RequestError

if TYPE_CHECKING:
    from spectral.codec import Codebook
    from spectral.hf import LoadedModel
    from spectral.pages import PageStore
    from spectral.profile import SpectralProfile

CONTEXT_TOKENS = 4
"""Prompt tokens that a plain completion's first piece of text is decoded with."""


class Engine:
    """Continuous batching of one model over paged stores. Not thread-safe, except for `encode`.

    Args:
        loaded: the model; codebook, setting: the setting that its cache runs at (None and "exact": uncompressed).
        limits: see EngineLimits; clock: seconds, monotonic.
        profile: where `set_setting` and requests with `max_kl` find other settings.
        checked: check all invariants after every step; None: if the variable SPECTRAL_DEBUG is set, when idle.
        decode: how decode steps run, see spectral.engine.graphs; None: what SPECTRAL_DECODE says.

    Raises CacheError if max_kv_bytes does not hold a single sequence.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        codebook: Codebook | None = None,
        setting: str = "exact",
        limits: EngineLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        profile: SpectralProfile | None = None,
        checked: bool | None = None,
        decode: str | None = None,
    ) -> None:
        self.loaded = loaded
        self.limits = limits or EngineLimits()
        self._clock = clock
        self._checked, self._debug = checked, bool(os.environ.get("SPECTRAL_DEBUG"))
        chunk = chunk_length(self.limits)
        self.lanes = Lanes(loaded, self.limits, chunk, codebook=codebook, setting=setting, profile=profile)
        self.sessions = Sessions(self.lanes, loaded.fingerprint, self.limits, profile)
        self.context_length = effective_context(self)
        self.vocab_size = int(loaded.model.get_input_embeddings().num_embeddings)
        self._longest_token = longest_token(loaded.tokenizer)
        self._decode = make_decoder(loaded.tokenizer)
        self._grammars = GrammarCompiler(loaded.tokenizer, self.vocab_size, loaded.eos_token_ids)
        self.runner = Runner(loaded, decode_graphs(loaded, self.lanes.stores, decode))
        self.scheduler = Scheduler(self.lanes, self.limits, divide=self.runner.divide, clock=clock)
        self.faults = Faults(self.lanes)
        self._live: dict[str, list[Sequence]] = {}
        self._session_of: dict[str, tuple[str, str]] = {}
        self._deadlines: dict[str, tuple[float, float]] = {}
        self._events: list[Event] = []
        self._order = 0
        self.prompt_tokens = self.generated_tokens = 0
        self.finished: Counter[str] = Counter()

    @property
    def setting(self) -> str:
        """The setting of sequences that begin now."""
        return self.lanes.current.setting

    @property
    def store(self) -> PageStore:
        """The store of sequences that begin now."""
        return self.lanes.current.store

    # -- requests -------------------------------------------------------------------------------------------------

    def encode(self, request: GenerateRequest) -> list[int]:
        """The prompt's token ids, and the request's grammar is compiled. Raises RequestError. One other thread may call
        it while this one steps."""
        check_length(request, self.context_length, self._longest_token)
        ids = encode_prompt(self.loaded.tokenizer, request, self.vocab_size)
        if len(ids) >= self.context_length:
            raise ContextLengthExceeded(len(ids), self.context_length, param=request.prompt_field)
        if request.params.grammar is not None:
            self._grammars.prepare(request.params.grammar)
        return ids

    def knows(self, grammar: Grammar | None) -> bool:
        """Whether a grammar was compiled or refused lately; a new one may take seconds. Threads: `encode`."""
        return self._grammars.known(grammar)

    def count(self, request: GenerateRequest) -> list[int]:
        """The prompt's token ids, also where they are more than the context. Raises RequestError. Threads: `encode`."""
        return encode_prompt(self.loaded.tokenizer, request, self.vocab_size)

    def submit(self, request: GenerateRequest, prompt: list[int] | None = None) -> int:
        """Queue a request. Returns its prompt's length in tokens.

        `prompt`: what `encode` returned, if it was called already. Raises RequestError, ContextLengthExceeded or
        QueueFull, and then nothing has started.
        """
        params = request.params
        if request.request_id in self._live:
            raise RequestError(f"request_id {request.request_id!r} is in use", param="request_id")
        if params.n > self.limits.max_queue + self.limits.max_concurrency:
            most = self.limits.max_queue + self.limits.max_concurrency
            raise RequestError(f"n is {params.n} and this model takes at most {most} at once", param="n")
        bad = next((token for token in params.logit_bias if token >= self.vocab_size), None)
        if bad is not None:
            raise RequestError(
                f"logit_bias holds token id {bad}; this model's ids are 0 to {self.vocab_size - 1}", param="logit_bias"
            )
        self.lanes.setting_for(request.max_kl, request.setting)  # refused before a full queue is
        if self.scheduler.room() < params.n:
            raise QueueFull(len(self.scheduler.waiting))
        ids = self.encode(request) if prompt is None else prompt
        limit = context_for(self, request, len(ids)) - len(ids)
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        # An answer in a chat begins a text of its own; a completion goes on with the prompt's.
        context = [] if request.is_chat else ids[-CONTEXT_TOKENS:]
        sequences = [self._sequence(request, i, ids, limit, context) for i in range(params.n)]
        if request.session is not None:
            name = self._session_of[request.request_id] = request.cache_salt, request.session
            self.sessions.begin(name, sequences[0])
        for sequence in sequences:
            self.scheduler.add(sequence)
        self._live[request.request_id] = sequences
        if request.timeout_s is not None:
            self._deadlines[request.request_id] = self._clock() + request.timeout_s, request.timeout_s
        self.prompt_tokens += len(ids)
        return len(ids)

    def _sequence(
        self, request: GenerateRequest, index: int, ids: list[int], limit: int, context: list[int]
    ) -> Sequence:
        self._order += 1
        params = request.params
        answer = Answer(
            self._decode,
            context=context,
            ends=() if params.ignore_eos else self.loaded.eos_token_ids,
            limit=limit,
            stops=params.stop,
            logprobs=params.logprobs is not None,
            with_end=params.prompt_logprobs is not None,
        )
        grammar = None if params.grammar is None else self._grammars.start(params.grammar)
        sampler = SamplerState(params, ids, index, grammar)
        scores: dict[int, Logprob] | None = {} if params.prompt_logprobs is not None and index == 0 else None
        # A prefix that is taken over is not computed, and so not scored: such a prompt shares its prefix with nobody.
        salt = request.cache_salt if scores is None else f"{request.cache_salt}\0{request.request_id}"
        return Sequence(
            request.request_id, index, self._order, list(ids), len(ids), sampler=sampler, answer=answer,
            priority=request.priority, tenant=request.tenant, salt=salt, max_kl=request.max_kl, scores=scores,
            setting=request.setting,
        )  # fmt: skip

    def cancel(self, request_id: str) -> None:
        """End a request and free its pages now; its choices' Finished events come with the next step. An id that is
        not live is ignored."""
        for sequence in self._live.get(request_id, [])[:]:
            self._finish(sequence, "cancelled")

    # -- the loop -------------------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True if `step` has something to do or to tell."""
        return bool(self._live or self._events)

    @property
    def live(self) -> list[str]:
        """Ids of the requests that wait or run."""
        return list(self._live)

    def step(self) -> list[Event]:
        """Schedule, run, postprocess. Returns what happened since the last step.

        An error in the forward fails the requests of this step and no others. Raises DeviceLost (see faults).
        """
        if self._deadlines:
            self._expire()
        parts = self.scheduler.schedule()
        while self.scheduler.failed:
            for part in parts:  # another choice of a request that fails may be in there
                part.batch.abort()
            failed, self.scheduler.failed = self.scheduler.failed, []
            gone = {sequence for sequence, _ in failed}
            for sequence, error in failed:
                self._fail(sequence.request_id, error, gone)
            parts = self.scheduler.schedule()
        for part in parts:
            self._run(part)
        if self._checked or (self._debug and self._checked is None and not self._live):
            self.check()
        events, self._events = self._events, []
        return events

    def _run(self, part: Part) -> None:
        if any(sequence.row is None for sequence, _ in part.work):
            part.batch.abort()  # a choice's request failed in an earlier part; the others have the next step
            return
        for sequence, _ in part.work:
            if not sequence.started:
                self._start(sequence)
        try:
            sampling, tokens, logprobs = self.runner.step(part)
        except Exception as error:  # whatever a model raises: these requests fail, the engine goes on
            part.batch.abort()
            for sequence in self.faults.victims(error, part.work):
                self._fail(sequence.request_id, error)
            for (sequence, count), pages in zip(part.work, part.batch.new_pages, strict=True):
                lost = count > 1 or self.runner.lost(part.batch.store, pages)
                if lost and sequence in self.scheduler.running and sequence.row.length:
                    self.scheduler.restart(sequence)
            return
        part.batch.commit()
        self.faults.succeeded()
        for sequence, _ in part.work:
            sequence.lane.prefix.keep(sequence)
        self.generated_tokens += len(tokens)
        for sequence, token, logprob in zip(sampling, tokens, logprobs, strict=True):
            self._advance(sequence, token, logprob)

    def _start(self, sequence: Sequence) -> None:
        siblings = self._live[sequence.request_id]
        if not any(s.started for s in siblings):
            self._events.append(Started(sequence.request_id, sequence.prompt_length))
        for sibling in siblings:
            sibling.started = True

    def _advance(self, sequence: Sequence, token: int, logprob: Logprob | None) -> None:
        if sequence not in self._live.get(sequence.request_id, ()):
            return  # another choice of the request failed in this step
        grammar = sequence.sampler.grammar
        error = BrokenNumbers() if token == BROKEN else grammar.error if grammar is not None else None
        if error is not None:
            self._fail(sequence.request_id, error)
            return
        if sequence.scores is not None:
            found, sequence.scores = sequence.scores, None
            logprobs = tuple(found[place] for place in range(1, sequence.prompt_length))
            self._events.append(PromptLogprobs(sequence.request_id, sequence.tokens[0], logprobs))
        sequence.tokens.append(token)
        answer: Answer = sequence.answer
        reason = answer.push(token, logprob)
        if grammar is not None:
            if reason != "stop" and grammar.finished:
                reason = answer.end()  # nothing can follow: the end token need not be waited for
            if reason == "stop" and (error := grammar.fault(answer.cut)) is not None:
                self._fail(sequence.request_id, error)
                return
        if (delta := answer.take(sequence.request_id, sequence.index, last=reason is not None)) is not None:
            self._events.append(delta)
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        held = 0 if sequence.row is None else self.store.row_nbytes(sequence.row)
        setting = self.setting if sequence.lane is None else sequence.lane.setting
        usage = Usage(sequence.prompt_length, sequence.answer.count, held, setting, sequence.cached)
        self._events.append(Finished(sequence.request_id, sequence.index, reason, usage))
        self.finished[reason] += 1
        if (name := self._session_of.get(sequence.request_id)) is not None and reason != "cancelled":
            self.sessions.keep(name, sequence)
        self.scheduler.remove(sequence)
        siblings = self._live[sequence.request_id]
        siblings.remove(sequence)
        if not siblings:
            self._forget(sequence.request_id)

    def _fail(self, request_id: str, error: Exception, gone: Collection[Sequence] = ()) -> None:
        """End a whole request. `gone`: choices that the scheduler has let go of already."""
        if request_id not in self._live:
            return  # several choices of one request failed together
        for sequence in self._live[request_id]:
            if sequence not in gone:
                self.scheduler.remove(sequence)
        self._events.append(Failed(request_id, error))
        self.finished["failed"] += 1
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        del self._live[request_id]
        self._deadlines.pop(request_id, None)
        self._session_of.pop(request_id, None)

    def _expire(self) -> None:
        now = self._clock()
        for request_id, (deadline, seconds) in list(self._deadlines.items()):
            if now >= deadline:
                self._fail(request_id, DeadlineExceeded(seconds))

    # -- memory ----------------------------------------------------------------------------------------------------

    def set_setting(self, setting: str) -> int:
        """Run at another setting of the profile from now on, between two steps. Returns the bytes freed on the device.

        Coarser: live caches are re-encoded in place and their streams go on, save those whose `max_kl` forbids it.
        Finer, or to and from "exact": sequences that begin from now on use it, live ones stay as they are. Idle
        prefixes are dropped; the longest context is what the cache's bytes hold at the setting. Raises SettingError,
        ProfileError or, where no sequence would fit, CacheError, and then nothing has changed.
        """
        self.runner.settle()
        before, freed = self.setting, self.lanes.set_setting(setting, self.live_sequences)
        self.runner.trim()
        try:
            self.context_length = effective_context(self)
        except CacheError:  # a setting so fine that no sequence fits; nothing was re-encoded for it
            self.lanes.set_setting(before, self.live_sequences)
            raise
        self.scheduler.unblock()
        return freed

    def park(self, request_id: str) -> int:
        """Move a request's running sequences to host memory until the next step has room for them; how many."""
        running = [s for s in self._live.get(request_id, []) if s.row is not None]
        for sequence in running:
            self.scheduler.park(sequence)
        return len(running)

    def trim(self, *, prefixes: bool = False, keep_bytes: int = 0) -> int:
        """Give back memory that nobody uses, idle prefixes too if asked; at most `keep_bytes` stay, under graphs."""
        if self.runner.graphs is not None and self.lanes.unused_nbytes <= keep_bytes:
            return 0
        before = self.lanes.nbytes
        if prefixes:
            self.lanes.free_idle(before)
        self.lanes.trim()
        self.runner.trim(everything=prefixes)
        return before - self.lanes.nbytes

    def save_session(
        self, session: str, path: str | os.PathLike[str], *, cache_salt: str = "", cold_level: str | None = None
    ) -> Path:
        """Write a paused session to a file; engines of the same model, profile and (at level small) links read it.
        `cold_level`: None: the limits'. Raises RequestError, SessionError (name, links) or OSError."""
        return self.sessions.save((cache_salt, session), path, cold_level)

    def resume_session(self, session: str, path: str | os.PathLike[str], *, cache_salt: str = "") -> int:
        """Read a session from a file; the next request with this name goes on from it. Returns its tokens.

        Raises RequestError (for the name), SessionError, SettingError, ProfileError or OSError, and then nothing has
        changed.
        """
        return self.sessions.resume((cache_salt, session), path)

    @property
    def live_sequences(self) -> list[Sequence]:
        """All choices of all requests that wait or run."""
        return [sequence for sequences in self._live.values() for sequence in sequences]

    def check(self) -> None:
        """Assert all invariants, see spectral.engine.upkeep."""
        check(self)

    def stats(self) -> EngineStats:
        """A snapshot of what runs, what the cache holds, and the counters."""
        return figures(self)

    def warm_up(self, *, tune: bool = True) -> None:
        """See spectral.engine.upkeep: the first request does not pay for what is set up lazily."""
        warm_up(self, tune=tune)
