"""What every token goes through in the gateway: batches, events that are written once, counting."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from server import sse
from server.answers.chat import _TextEvent, chunk
from server.scheduler.stream import RequestStream, SlowReader
from server.token_meter import TokenMeters
from server.worker import messages as m

HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 5, "model": 'a "content":"" b'}


@pytest.mark.parametrize("text", ["x", 'a "quoted" one', "é\n\u2028\ud7ff", '"content":""', "\\", "\x00", "😀"])
def test_an_event_that_was_written_once_is_the_event(text: str) -> None:
    head = {**HEAD, "usage": None}
    event = _TextEvent(head, 3)(text)
    assert event == sse.event({**head, "choices": [chunk(3, {"content": text})]})
    assert json.loads(event.removeprefix(b"data: "))["choices"][0]["delta"] == {"content": text}


async def test_all_that_has_come_is_taken_at_once_and_in_order() -> None:
    stream = RequestStream("r", 10.0)
    assert stream.taken() == []
    coming = stream.coming()
    sent = [m.Delta("r", 0, str(number), [number]) for number in range(3)]
    for item in sent:
        stream.put(item)
    await asyncio.wait_for(coming, 1.0)
    assert stream.taken() == sent
    assert stream.taken() == []
    stream.put(None)
    assert await stream.get() is None
    stream.close()


async def test_a_full_stream_is_told_to_its_reader() -> None:
    stream = RequestStream("r", 10.0)
    while not stream.overflowed:
        stream.put(m.Delta("r", 0, "x", [1]))
    with pytest.raises(SlowReader):
        stream.taken()
    stream.close()


async def test_the_deadline_wakes_a_waiting_reader() -> None:
    stream = RequestStream("r", 0.01)
    await asyncio.wait_for(stream.coming(), 5.0)
    with pytest.raises(asyncio.TimeoutError):
        stream.taken()
    stream.close()


def exposed(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}


def test_a_meter_counts_as_the_library_does() -> None:
    bounds, values = (0.01, 0.02, 1.0), (0.001, 0.01, 0.0100001, 0.5, 3.0)
    theirs = CollectorRegistry()
    histogram = Histogram("gap_seconds", "x", ("model",), buckets=bounds, registry=theirs)
    ours = CollectorRegistry()
    meters = TokenMeters(("tokens_total", "x"), ("gap_seconds", "x"), bounds)
    ours.register(meters)
    for value in values:
        histogram.labels("a").observe(value)
        meters.of("a").gap(value)
    meters.of("a").tokens += 7
    meters.of("b")
    expected: dict[str, Any] = exposed(theirs)
    assert exposed(ours) == {**expected, 'tokens_total{model="a"}': 7.0, 'tokens_total{model="b"}': 0.0}
    meters.forget("a")
    assert exposed(ours) == {'tokens_total{model="b"}': 0.0}
