"""The engine: requests in, events out, one step at a time."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch

from spectral.engine.answer import Answer
from spectral.engine.chat import encode_prompt
from spectral.engine.detokenize import longest_token, make_decoder
from spectral.engine.grammar import GrammarCompiler
from spectral.engine.runner import Runner
from spectral.engine.sampler import SamplerState, sample
from spectral.engine.scheduler import Scheduler, Step
from spectral.engine.sequence import Sequence
from spectral.engine.types import (
    EngineLimits,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    GenerateRequest,
    Logprob,
    Message,
    SamplingParams,
    Started,
    Usage,
)
from spectral.errors import CacheError, ContextLengthExceeded, DeadlineExceeded, QueueFull, RequestError
from spectral.pages import PageStore

if TYPE_CHECKING:
    from spectral.codec import Codebook
    from spectral.hf import LoadedModel

log = logging.getLogger("spectral.engine")

CONTEXT_TOKENS = 4
"""Prompt tokens that a plain completion's first piece of text is decoded with."""


class Engine:
    """Continuous batching of one model over one page store. Not thread-safe, except for `encode`.

    Args:
        loaded: the model; codebook, setting: the setting that its cache runs at (None and "exact": uncompressed).
        limits: see EngineLimits; clock: seconds, monotonic.

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
    ) -> None:
        self.loaded, self.setting = loaded, setting
        self.limits = limits or EngineLimits()
        self._clock = clock
        # The exact setting keeps what the model computes: its answers are those of an uncompressed cache.
        dtype = next(loaded.model.parameters()).dtype if codebook is None else torch.bfloat16
        self.store = PageStore(
            loaded.shape, codebook, device=loaded.device, max_bytes=self.limits.max_kv_bytes, window_dtype=dtype
        )
        self.context_length = self._effective_context()
        self.vocab_size = int(loaded.model.get_input_embeddings().num_embeddings)
        self._longest_token = longest_token(loaded.tokenizer)
        self._decode = make_decoder(loaded.tokenizer)
        self._grammars = GrammarCompiler(loaded.tokenizer, self.vocab_size, loaded.eos_token_ids)
        self._runner = Runner(loaded)
        self._scheduler = Scheduler(self.store, self.limits)
        self._live: dict[str, list[Sequence]] = {}
        self._deadlines: dict[str, tuple[float, float]] = {}
        self._events: list[Event] = []
        self._order = 0
        self._prompt_tokens = self._generated_tokens = 0
        self._finished: Counter[str] = Counter()

    def _effective_context(self) -> int:
        """The longest sequence that the model, the limits and the cache's bytes allow, in tokens."""
        context = min(self.loaded.context_length, self.limits.context_length or self.loaded.context_length)
        most = self.limits.max_kv_bytes
        if most is None or self.store.bytes_per_token(context) * context <= most:
            return context
        low, high = 0, context
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.store.bytes_per_token(middle) * middle <= most else (low, middle)
        if low < 2:
            needed = round(self.store.bytes_per_token(1))
            raise CacheError(
                f"limits.max_kv_bytes is {most} and one sequence's exact window alone takes {needed} bytes; raise it"
            )
        return low

    # -- requests -------------------------------------------------------------------------------------------------

    def encode(self, request: GenerateRequest) -> list[int]:
        """The prompt's token ids. Raises RequestError. One other thread may call it while this one steps."""
        self._check_length(request)
        ids = encode_prompt(self.loaded.tokenizer, request, self.vocab_size)
        if len(ids) >= self.context_length:
            raise ContextLengthExceeded(len(ids), self.context_length, param=request.prompt_field)
        return ids

    def count(self, request: GenerateRequest) -> list[int]:
        """The prompt's token ids, also where they are more than the context. Raises RequestError. Threads: `encode`."""
        return encode_prompt(self.loaded.tokenizer, request, self.vocab_size)

    def _check_length(self, request: GenerateRequest) -> None:
        """Refuse a text that cannot fit whatever its tokens are: tokenizing megabytes takes seconds."""
        prompt = request.prompt
        size = len(prompt) if isinstance(prompt, str) else sum(len(m.content) for m in prompt if isinstance(m, Message))
        least = size // self._longest_token
        if least >= self.context_length:
            raise RequestError(
                f"the prompt has {size} characters, which is more than {least} tokens, and this model's context is "
                f"{self.context_length} tokens; shorten the prompt",
                param=request.prompt_field,
                code="context_length_exceeded",
            )

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
        if self._scheduler.room() < params.n:
            raise QueueFull(len(self._scheduler.waiting))
        ids = self.encode(request) if prompt is None else prompt
        limit = self.context_length - len(ids)
        if params.max_tokens is not None:
            limit = min(limit, params.max_tokens)
        # An answer in a chat begins a text of its own; a completion goes on with the prompt's.
        context = [] if request.is_chat else ids[-CONTEXT_TOKENS:]
        sequences = [self._sequence(request.request_id, i, params, ids, limit, context) for i in range(params.n)]
        for sequence in sequences:
            self._scheduler.add(sequence)
        self._live[request.request_id] = sequences
        if request.timeout_s is not None:
            self._deadlines[request.request_id] = self._clock() + request.timeout_s, request.timeout_s
        self._prompt_tokens += len(ids)
        return len(ids)

    def _sequence(
        self, request_id: str, index: int, params: SamplingParams, ids: list[int], limit: int, context: list[int]
    ) -> Sequence:
        self._order += 1
        answer = Answer(
            self._decode,
            context=context,
            ends=() if params.ignore_eos else self.loaded.eos_token_ids,
            limit=limit,
            stops=params.stop,
            logprobs=params.logprobs is not None,
        )
        grammar = None if params.grammar is None else self._grammars.start(params.grammar)
        sampler = SamplerState(params, ids, index, grammar)
        return Sequence(request_id, index, self._order, list(ids), len(ids), sampler=sampler, answer=answer)

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

        An error in the forward fails the requests of this step and no others.
        """
        if self._deadlines:
            self._expire()
        step = self._scheduler.schedule()
        if self._scheduler.failed:
            failed, self._scheduler.failed = self._scheduler.failed, []
            gone = {sequence for sequence, _ in failed}
            for sequence, error in failed:
                self._fail(sequence.request_id, error, gone)
        if step is not None:
            self._run(step)
        events, self._events = self._events, []
        return events

    def _run(self, step: Step) -> None:
        for sequence, _ in step.work:
            if not sequence.started:
                self._start(sequence)
        try:
            with torch.inference_mode():
                sampling, logits = self._runner.run(step)
                tokens, logprobs = sample(logits, [s.sampler for s in sampling]) if sampling else ([], [])
        except Exception as error:  # whatever a model raises: these requests fail, the engine goes on
            log.exception("a step of %d sequences failed", len(step.work))
            step.batch.abort()
            for sequence, _ in step.work:
                self._fail(sequence.request_id, error)
            return
        step.batch.commit()
        self._generated_tokens += len(tokens)
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
        if grammar is not None and grammar.error is not None:
            self._fail(sequence.request_id, grammar.error)
            return
        sequence.tokens.append(token)
        answer: Answer = sequence.answer
        reason = answer.push(token, logprob)
        if reason is None and grammar is not None and grammar.finished:
            reason = answer.end()  # nothing can follow: the end token need not be waited for
        delta = answer.take(sequence.request_id, sequence.index, last=reason is not None)
        if delta is not None:
            self._events.append(delta)
        if reason is not None:
            self._finish(sequence, reason)

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        held = 0 if sequence.row is None else self.store.row_nbytes(sequence.row)
        usage = Usage(sequence.prompt_length, sequence.answer.count, held)
        self._events.append(Finished(sequence.request_id, sequence.index, reason, usage))
        self._finished[reason] += 1
        self._scheduler.remove(sequence)
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
                self._scheduler.remove(sequence)
        self._events.append(Failed(request_id, error))
        self._finished["failed"] += 1
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        del self._live[request_id]
        self._deadlines.pop(request_id, None)

    def _expire(self) -> None:
        now = self._clock()
        for request_id, (deadline, seconds) in list(self._deadlines.items()):
            if now >= deadline:
                self._fail(request_id, DeadlineExceeded(seconds))

    # -- figures --------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        """A snapshot of what runs, what the cache holds, and the counters."""
        return EngineStats(
            running=len(self._scheduler.running),
            queued=len(self._scheduler.waiting),
            kv_bytes_allocated=self.store.nbytes,
            kv_bytes_used=self.store.used_nbytes,
            kv_tokens=self.store.tokens,
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._scheduler.preemptions,
            finished=dict(self._finished),
        )

    def warm_up(self) -> None:
        """Run a prompt and a decode step once, so that the first request does not pay for what is set up lazily."""
        row: Any = self.store.open()
        sequence = Sequence("warm-up", 0, 0, [0] * min(8, self.context_length - 1), 1, row=row)
        for _ in range(2):
            batch = self.store.begin([(row, sequence.pending)])
            try:
                with torch.inference_mode():
                    _, logits = self._runner.run(Step([(sequence, sequence.pending)], batch))
                    tokens, _ = sample(logits, [SamplerState(SamplingParams(temperature=0), [])])
            except Exception:
                batch.abort()
                self.store.close(row)
                raise
            batch.commit()
            sequence.tokens.append(tokens[0])
        self.store.close(row)
        self.store.trim()
