"""From a checked request to the worker's stream: model ready -> submitted -> accepted, before any answer starts."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Protocol, TypeVar

import msgspec
from fastapi import Request

from server import errors, sse
from server.auth import Caller, caller_of
from server.figures import setting_info
from server.limits import Limiter, Permit
from server.scheduler.loop import Scheduler
from server.scheduler.slots import Slot
from server.scheduler.stream import RequestStream, SlowReader, StreamItem
from server.tracing import RequestSpan
from server.worker import messages

T = TypeVar("T")


class Submittable(Protocol):
    """A checked request body."""

    model: str

    def check(self, ready: messages.Ready) -> None:
        """Raises ApiError 400 where the model, as it is now, cannot do what is asked."""
        ...

    def submit(self, request_id: str) -> messages.Submit:
        """The message to the worker."""
        ...


class Generation:
    """A submitted request. Await :meth:`accepted`, iterate :meth:`items`, always end with :meth:`close`.

    `notes` belongs to the HTTP request; a failure leaves its status there as "outcome", for the log and the metrics:
    in the middle of a stream the HTTP status has long been 200. `began`: monotonic seconds.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        slot: Slot,
        ready: messages.Ready,
        stream: RequestStream,
        submit: messages.Submit,
        began: float,
        notes: dict[str, Any],
        permit: Permit | None = None,
        field_names: dict[str, str] | None = None,
    ) -> None:
        self.model = slot.name
        self.tool_format = ready.tool_format
        # A grammar holds an answer from its first letter on: nothing in it is a thought, however the prompt ends.
        held = submit.sampling.grammar is not None and submit.sampling.grammar.kind != "tool_calls"
        apart = submit.kind == "chat" and not held and slot.settings.thoughts == "apart"
        self.thought_format = ready.thought_format if apart else ""
        self.thinks = False  # the prompt ended within thoughts
        self.thought_tokens = 0
        self.request_id = submit.request_id
        self.created = int(time.time())
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.kv_bytes = 0
        self.cached_tokens = 0  # of the prompt, those whose cache was there
        self.finish_reasons: dict[int, str] = {}
        self._choices = submit.sampling.n
        self._field_names = field_names or {}
        self._scheduler = scheduler
        self._slot = slot
        self._ready = ready
        self._stream = stream
        self.began = began
        self.accepted_at = began
        self._setting = ""
        self.prompt: messages.PromptTokens | None = None
        self._notes = notes
        self._span: RequestSpan | None = notes.get("span")
        self._permit = permit
        self._meter = scheduler.metrics.tokens.of(slot.name)
        self._last_token: dict[int, float] = {}
        self._over = False
        self._closed = False

    async def accepted(self) -> None:
        """Wait for the worker's answer. Raises ApiError where it rejects the request or ends."""
        try:
            item = await self._stream.get()
        except (asyncio.TimeoutError, SlowReader) as error:
            raise self._given_up(error) from None
        if item is None:
            self._over = True
            raise self._failed(self._scheduler.worker_lost(self._slot))
        if isinstance(item, messages.Rejected):
            self._over = True
            raise self._failed(_refusal(item, self._field_names, self._slot))
        if isinstance(item, messages.Failed):
            self._over = True
            raise self._failed(_failure(item, self._field_names, self._slot))
        if not isinstance(item, messages.Accepted):
            raise self._failed(errors.ApiError(500, "the worker broke its protocol", code="internal_error"))
        self.prompt_tokens, self.accepted_at = item.prompt_tokens, time.monotonic()
        if self._span is not None:
            self._span.waited(self.began, self.accepted_at, self.model)
        self._setting, self.thinks = item.setting, item.thinks
        if self._permit is not None:
            self._permit.spend(item.prompt_tokens)
        self._scheduler.metrics.prompt_tokens.labels(self.model).inc(item.prompt_tokens)

    async def items(self) -> AsyncIterator[messages.Delta | messages.Finished]:
        """Deltas and ends of choices. Raises ApiError where the generation fails on the way."""
        async for batch in self.batches():
            if isinstance(batch, messages.Finished):
                yield batch
                continue
            for item in batch:
                yield item

    async def batches(self) -> AsyncIterator[list[messages.Delta] | messages.Finished]:
        """The same, with as many deltas at once as have come: a reader that falls behind has less to do for each."""
        while len(self.finish_reasons) < self._choices:
            deltas: list[messages.Delta] = []
            taken = self._taken()
            if not taken:
                await self._stream.coming()
            for item in taken:
                if type(item) is messages.Delta:
                    deltas.append(item)
                    continue
                if deltas:  # first, whatever comes next
                    self._measure(deltas)
                    yield deltas
                    deltas = []
                if isinstance(item, messages.PromptTokens):
                    self.prompt = item
                else:
                    yield self._finished(item)
            if deltas:
                self._measure(deltas)
                yield deltas

    def _finished(self, item: StreamItem | None) -> messages.Finished:
        """The end of a choice, noted. Raises ApiError where it is another end."""
        if isinstance(item, messages.Failed):
            self._over = True
            raise self._failed(_failure(item, self._field_names, self._slot))
        if not isinstance(item, messages.Finished):
            self._over = True
            raise self._failed(self._scheduler.worker_lost(self._slot))
        if item.reason == "cancelled":
            raise self._failed(self._scheduler.was_cancelled())
        cached = item.usage.cached_tokens  # choices take over what one of them computed: the least is what was there
        self.cached_tokens = min(self.cached_tokens, cached) if self.finish_reasons else cached
        self.finish_reasons[item.index] = item.reason
        self.completion_tokens += item.usage.completion_tokens
        if self._permit is not None:
            self._permit.spend(item.usage.completion_tokens)
        self.kv_bytes += item.usage.kv_bytes
        self._setting = item.usage.setting or self._setting  # a squeeze may have changed it on the way
        if self._span is not None:
            self._span.answered(item, time.monotonic())
        self._scheduler.metrics.answers.labels(self.model, item.reason).inc()
        if len(self.finish_reasons) == self._choices:
            self._over = True
            self._scheduler.metrics.answer_duration.labels(self.model).observe(time.monotonic() - self.began)
        return item

    def _taken(self) -> list[StreamItem | None]:
        """What has come. Raises ApiError where the stream gives up."""
        try:
            return self._stream.taken()
        except (asyncio.TimeoutError, SlowReader) as error:
            raise self._given_up(error) from None

    def _given_up(self, error: Exception) -> errors.ApiError:
        if isinstance(error, SlowReader):
            return self._failed(errors.slow_client())
        return self._failed(errors.deadline_exceeded(self._stream.seconds, self._stream.seconds_field))

    def _failed(self, error: errors.ApiError) -> errors.ApiError:
        self._notes["outcome"], self._notes["code"] = error.status, error.code
        return error

    def _measure(self, deltas: list[messages.Delta]) -> None:
        now, last_of, meter = time.monotonic(), self._last_token, self._meter
        for item in deltas:
            meter.tokens += len(item.token_ids)
            last = last_of.get(item.index)
            if last is not None:
                meter.gap(now - last)
            elif not last_of:
                self._scheduler.metrics.ttft.labels(self.model).observe(now - self.began)
            last_of[item.index] = now

    async def close(self) -> None:
        """Stop listening; cancel the request in the worker where it is not over. Safe to call twice."""
        if not self._closed:
            self._closed = True
            self._notes["usage"] = self.counts
            if self._permit is not None:
                self._permit.release()
            self._scheduler.release(self._slot, self._stream, cancel=not self._over)

    @property
    def headers(self) -> dict[str, str]:
        """Response headers about the cache, and about the caller's limits."""
        info = setting_info(self._ready, self._setting)
        about = {
            "X-Spectral-Setting": info["setting"],
            "X-Spectral-Rank": f"{info['rank']:g}",
            "X-Spectral-Bits": f"{info['bits_per_element']:.4g}",
            "X-Spectral-KL": f"{info['kl_mean']:.4g}",
            "X-Spectral-Bytes-Per-Token": f"{info['bytes_per_token']:.6g}",
        }
        return about if self._permit is None else {**about, **self._permit.headers}

    @property
    def usage(self) -> dict[str, Any]:
        """Token counts as the OpenAI API has them."""
        usage = {**self.counts, "prompt_tokens_details": {"cached_tokens": self.cached_tokens}}
        if self.thought_format:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.thought_tokens}
        return usage

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of the prompt and the answer, and both."""
        total = self.prompt_tokens + self.completion_tokens
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": total}

    @property
    def spectral(self) -> dict[str, Any]:
        """What the cache did for this request; see :func:`setting_info`."""
        return {**setting_info(self._ready, self._setting), "cache_bytes": self.kv_bytes}


def _refusal(item: messages.Rejected, field_names: dict[str, str], slot: Slot) -> errors.ApiError:
    """A worker's Rejected in the words of the interface that the client speaks."""
    param, message = _named(item, field_names)
    wait = slot.admission.retry_after() if item.status in (429, 503) else None
    return errors.ApiError(item.status, message, code=item.code, param=param, retry_after=wait)


def _failure(item: messages.Failed, field_names: dict[str, str], slot: Slot) -> errors.ApiError:
    """A worker's Failed in those words."""
    param, message = _named(item, field_names)
    return errors.failed(message, item.code, slot.admission.retry_after(), param)


def _named(item: messages.Rejected | messages.Failed, field_names: dict[str, str]) -> tuple[str | None, str]:
    """The field at fault as the interface calls it, and a message that names it."""
    param = field_names.get(item.param or "", item.param)
    return param, item.message if param is None or param in item.message else f"{param}: {item.message}"


class Gateway:
    """Opens generations."""

    def __init__(self, scheduler: Scheduler, limiter: Limiter) -> None:
        self.scheduler = scheduler
        self.limiter = limiter

    async def open(self, body: Submittable, request: Request, field_names: dict[str, str] | None = None) -> Generation:
        """Submit and wait for Accepted. Raises ApiError, or ClientGone where the client leaves before that.

        `field_names`: what this interface calls the fields that a worker names when it rejects a request.
        """
        began = time.monotonic()
        slot, permit = self._admit(body.model, request)
        try:
            submit = self._on_behalf(body.submit(uuid.uuid4().hex), request)
            notes = request.scope["state"]
            work = self._open(slot, submit, began, notes, body, permit, field_names)
            opening = asyncio.ensure_future(work)
            try:
                return await unless_gone(request, opening)
            except BaseException:
                if opening.done() and not opening.cancelled() and opening.exception() is None:
                    await opening.result().close()  # accepted in the very moment in which its reader went away
                raise
        except BaseException:
            if permit is not None:
                permit.release()
            raise

    def _on_behalf(self, submit: messages.Submit, request: Request) -> messages.Submit:
        """Callers with keys share the engine fairly, and no prefixes: how fast an answer begins would tell what others
        have asked. The salt is the key's hash and not its name: a new key under an old name does not inherit what the
        old one left in the cache. Only an administrator's key goes before the others. Raises ApiError 403."""
        record = caller_of(request.scope).record
        if record is not None and submit.priority > 0 and record.role != "admin":
            message = "priority: above 0 needs an admin key; this key may ask for -100 to 0"
            raise errors.forbidden(message, code="priority_not_allowed", param="priority")
        return submit if record is None else msgspec.structs.replace(submit, tenant=record.name, cache_salt=record.hash)

    def _admit(self, model: str, request: Request) -> tuple[Slot, Permit | None]:
        """The model's slot and the caller's permit. Raises ApiError 403, 404 or 429."""
        notes = request.scope["state"]
        caller = caller_of(request.scope)
        slot = self.slot(model, caller)
        notes["model"] = slot.name
        return slot, self.limiter.admit(caller)

    def slot(self, model: str, caller: Caller) -> Slot:
        """A model's slot, by name or alias. Raises ApiError 403 or 404."""
        found = self.scheduler.settings.find(model)
        if found is None:
            slots = self.scheduler.slots.values()
            known = [slot.name for slot in slots if caller.may_use(slot.name, *slot.settings.aliases)]
            raise errors.model_not_found(model, known)
        caller.check_model(found.name, *found.aliases)
        return self.scheduler.slot(model)

    async def tokenize(
        self, model: str, message: messages.Tokenize, request: Request, field_names: dict[str, str]
    ) -> messages.Tokenized:
        """A worker's answer to Tokenize. Raises ApiError, or ClientGone. `field_names`: see :meth:`open`."""
        slot, permit = self._admit(model, request)
        try:
            return await unless_gone(request, self._tokenize(slot, message, request, field_names))
        finally:
            if permit is not None:
                permit.release()

    async def _tokenize(
        self, slot: Slot, message: messages.Tokenize, request: Request, field_names: dict[str, str]
    ) -> messages.Tokenized:
        record = caller_of(request.scope).record
        worker = await self.scheduler.ensure(slot, tenant="" if record is None else record.name)
        seconds = self.scheduler.settings.server.request_timeout_seconds
        stream = self.scheduler.submit(slot, worker, message, seconds)
        try:
            item = await stream.get()
        except asyncio.TimeoutError:
            raise errors.deadline_exceeded(seconds) from None
        finally:
            self.scheduler.release(slot, stream, cancel=False)
        if isinstance(item, messages.Rejected):
            raise _refusal(item, field_names, slot)
        if not isinstance(item, messages.Tokenized):
            raise self.scheduler.worker_lost(slot)
        return item

    async def _open(
        self,
        slot: Slot,
        submit: messages.Submit,
        began: float,
        notes: dict[str, Any],
        body: Submittable,
        permit: Permit | None,
        field_names: dict[str, str] | None,
    ) -> Generation:
        # 0 is carried out by the interface that has it, when the answer is over.
        worker = await self.scheduler.ensure(slot, getattr(body, "keep_alive", None) or None, submit.tenant)
        ready = slot.ready
        if ready is None:  # the worker ended in the very moment after it was hot
            raise self.scheduler.worker_lost(slot)
        body.check(ready)
        most = self.scheduler.settings.server.request_timeout_seconds
        asked = getattr(body, "timeout_seconds", None)
        seconds = min(most, asked or most)
        stream = self.scheduler.submit(slot, worker, submit, began + seconds - time.monotonic())
        stream.seconds, stream.seconds_field = seconds, "timeout_seconds" if asked == seconds else None
        generation = Generation(self.scheduler, slot, ready, stream, submit, began, notes, permit, field_names)
        try:
            await generation.accepted()
        except BaseException:  # also a cancellation: the worker must not go on for nobody
            await generation.close()
            raise
        return generation


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; cancels it and raises ClientGone when the client closes the connection first."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(sse.disconnected(request.receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise errors.ClientGone
    finally:
        gone.cancel()
        working.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)
