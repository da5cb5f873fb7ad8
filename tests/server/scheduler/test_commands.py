"""Commands to workers: what is counted when one takes long, and who gets which answer."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from server.scheduler import carry_out
from server.scheduler.steward import Steward
from server.worker import messages as m
from tests.server.scheduler.memory_worker import EXACT, GIB
from tests.server.scheduler.test_memory import Scripted, model, serving


async def test_a_squeeze_that_takes_long_does_not_keep_what_the_model_does_not_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(carry_out, "SQUEEZE_S", 0.1)
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 4, "-slow"), model("b", 5.5)) as server:
        stream = await server.ask("a", "hold")
        steward = server.scheduler.memory.steward
        ward, ends = steward.wards["a"], []
        await server.until(lambda: ward.kv_tokens == 1000 and ward.lease >= 2 * GIB)

        def moved(name: str, place: Any, lease: int, now: float, *, refused: bool = False) -> None:
            ends.extend([(place.setting, lease)] if refused else [])
            Steward.moved(steward, name, place, lease, now, refused=refused)

        monkeypatch.setattr(steward, "moved", moved)
        waiting = asyncio.create_task(server.ask("b"))
        await server.until(lambda: bool(ends))
        assert "its squeeze takes long" in server.events.of("lease")[0]
        [(setting, lease)] = ends
        assert setting == "4x" and 1.1 * 1000 * EXACT / 4 <= lease + 1 < 2 * GIB, "what the worker was told is counted"
        waiting.cancel()
        server.scheduler.release(server.scheduler.slots["a"], stream, cancel=True)


async def test_commands_at_once_have_a_footprint_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    async with serving(monkeypatch, tmp_path, Scripted(12), model("a", 4)) as server:
        await server.ask("a")
        slot, moves = server.scheduler.slots["a"], server.scheduler.memory.moves
        await server.until(lambda: not slot.commands)
        tasks = [asyncio.create_task(moves.send(slot, partial(m.SetLease, max_bytes=GIB))) for _ in range(2)]
        await asyncio.sleep(0)
        for number, ident in enumerate(list(slot.commands)):  # before anything of the worker's can have come
            server.scheduler._take(slot, m.Footprint(0, 32_768, weights_bytes=number, reserved_bytes=0, host_bytes=0))
            server.scheduler._take(slot, m.Done(ident))
        assert [print_ and print_.weights_bytes for print_ in await asyncio.gather(*tasks)] == [0, 1]
