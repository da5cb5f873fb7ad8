"""Beside the loop: an engine's invariants, figures and warming up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spectral.engine.sampler import SamplerState
from spectral.engine.scheduler import Part
from spectral.engine.sequence import Sequence
from spectral.engine.types import EngineStats, GenerateRequest, SamplingParams
from spectral.errors import CacheError, RequestError

if TYPE_CHECKING:
    from spectral.engine.engine import Engine


def check(engine: Engine) -> None:
    """Assert, between two steps: every page's owners and every byte are counted right, the budget is kept, and
    sequences, rows and lanes belong together."""
    engine.lanes.check()
    live, scheduler = engine.live_sequences, engine.scheduler
    assert {id(s) for s in live if s.row is not None} == {id(s) for s in scheduler.running}, "running and rows differ"
    known = [id(s) for s in (*scheduler.running, *scheduler.waiting)]
    assert sorted(known) == sorted(id(s) for s in live), "a sequence is lost, or is scheduled twice"
    assert len(scheduler.running) <= engine.limits.max_concurrency
    for lane in engine.lanes.all:
        mine = [s for s in live if s.lane is lane]
        assert lane.members == len(mine), "a lane's members are miscounted"
        assert lane.store.rows == sum(s.row is not None for s in mine), "a row belongs to no sequence"
        assert mine or lane is engine.lanes.current, "a lane without sequences is kept"
    parked = sum(s.parked.nbytes for s in live if s.parked is not None)
    assert parked == engine.lanes.parked_nbytes, "parked bytes are miscounted"
    most = engine.limits.max_host_bytes
    assert most is None or parked <= most, "over the host budget"


def effective_context(engine: Engine, setting: str | None = None) -> int:
    """The longest sequence that the model, the limits and the cache's bytes allow, in tokens.

    `setting`: of its cache; None: the engine's. Raises CacheError where not a single sequence fits.
    """
    context = min(engine.loaded.context_length, engine.limits.context_length or engine.loaded.context_length)
    most = engine.limits.max_kv_bytes
    per_token = engine.lanes.bytes_per_token(engine.setting if setting is None else setting)
    if most is None or per_token(context) * context <= most:
        return context
    low, high = 0, context
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if per_token(middle) * middle <= most else (low, middle)
    if low < 2:
        needed = round(per_token(1))
        raise CacheError(
            f"limits.max_kv_bytes is {most} and one sequence's exact window alone takes {needed} bytes; raise it"
        )
    return low


def context_for(engine: Engine, request: GenerateRequest, prompt_tokens: int) -> int:
    """The longest sequence for a request, in tokens: at a setting of its own the cache's bytes may hold less.

    Raises RequestError for a setting that cannot be had, or at which its prompt does not fit.
    """
    setting = engine.lanes.setting_for(request.max_kl, request.setting)
    if setting == engine.setting:
        return engine.context_length
    try:
        context = min(engine.context_length, effective_context(engine, setting))
    except CacheError:
        context = 0
    if prompt_tokens < context:
        return context
    asked = "max_kl" if request.setting is None else "setting"
    raise RequestError(
        f"{asked} needs a cache at setting {setting}, of which this model's bytes hold {context} tokens, and the "
        f"prompt has {prompt_tokens}; shorten the prompt, ask for less quality, or raise limits.max_kv_bytes",
        param=asked,
        code="quality_unavailable",
    )


def figures(engine: Engine) -> EngineStats:
    """A snapshot of what runs, what the cache holds, and the counters."""
    lanes, scheduler = engine.lanes, engine.scheduler
    asked, reused = lanes.reuse
    return EngineStats(
        running=len(scheduler.running),
        queued=len(scheduler.waiting),
        kv_bytes_allocated=lanes.nbytes,
        kv_bytes_used=sum(lane.store.used_nbytes for lane in lanes.all),
        kv_tokens=sum(lane.store.tokens for lane in lanes.all),
        prompt_tokens=engine.prompt_tokens,
        generated_tokens=engine.generated_tokens,
        preemptions=scheduler.preemptions,
        finished=dict(engine.finished),
        setting=engine.setting,
        prefix_asked=asked,
        prefix_reused=reused,
        prefix_bytes=sum(lane.prefix.nbytes for lane in lanes.all),
        parked=sum(s.parked is not None for s in scheduler.waiting),
        parked_bytes=lanes.parked_nbytes + engine.sessions.nbytes,
        squeezes=lanes.squeezes,
        sessions=len(engine.sessions),
    )


def warm_up(engine: Engine, *, tune: bool = True) -> None:
    """Run a prompt and decode steps; leaves nothing behind. Raises what the model raises.

    On a GPU what its kernels should choose is measured first, where nobody knows it and `tune` allows it
    (spectral.kernels.first_use). There the prompt is long enough for a page, so that the kernels that read pages are
    compiled before any request, for few pages, for many and for most; a short chunk and as many decode steps follow as
    it takes to capture one, and a short prompt.
    """
    store = engine.store
    if store.device.type != "cuda":
        _warm(engine, 8, 2)
        return
    from spectral.code_dispatch import warm_codes
    from spectral.dispatch import installed
    from spectral.kernels.choices import forced

    if tune and installed():
        from spectral.kernels.first_use import tune_at_first_use

        loaded = engine.loaded
        tune_at_first_use(store.codebook, loaded.shape.query_heads, next(loaded.model.parameters()).dtype)
    length = 8 + store.codebook.sinks + store.codebook.window + 2 * store.codebook.page_tokens
    for most in (1 << 30, 1):
        with forced(shared_blocks=0, few_splits=0, most_splits=most, many_queries=most - 1, piece_programs=1):
            _warm(engine, length, 2)
        engine.runner.trim(everything=True)  # a step that was launched so must not be captured so
    _warm(engine, length, 5, chunk=3)
    _warm(engine, store.codebook.sinks + 4, 1)
    warm_codes(store.codebook)  # chunks over codes, and squeezing


def _warm(engine: Engine, length: int, steps: int, chunk: int = 1) -> None:
    """A prompt of `length` tokens, and `steps` steps in all, the second one with `chunk` tokens."""
    store = engine.store
    row: Any = store.open()
    sampler = SamplerState(SamplingParams(temperature=0), [])
    prompt = [0] * min(length, engine.context_length - steps - chunk)
    sequence = Sequence("warm-up", 0, 0, prompt, 1, row=row, lane=engine.lanes.current, sampler=sampler)
    for number in range(steps):
        batch = store.begin([(row, sequence.pending)])
        try:
            _, tokens, _ = engine.runner.step(Part([(sequence, sequence.pending)], batch))
        except Exception:
            batch.abort()
            store.close(row)
            raise
        batch.commit()
        sequence.tokens += [tokens[0]] * (1 if number else chunk)
    store.close(row)
    store.trim()
