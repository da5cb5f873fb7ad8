"""What runs beside a captured step runs in its order where nothing is captured (streams: on a GPU, by its benches)."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from spectral import beside
from spectral.beside import Beside, abreast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_outside_of_a_capture_everything_runs_in_its_order() -> None:
    done = []
    with Beside(DEVICE) as side:
        side.begin()
        done.append("before")
        side.run(lambda: done.append("beside"))
        done.append("after")
        side.meet()
    with abreast(DEVICE, 3) as run:
        for number in range(5):
            run(lambda number=number: done.append(number))
    assert done == ["before", "beside", "after", 0, 1, 2, 3, 4]


class Stream:
    """A stream that writes down whom it waits for."""

    def __init__(self, name: str, waits: list[tuple[str, str]]) -> None:
        self.name, self._waits = name, waits

    def wait_stream(self, other: Stream) -> None:
        self._waits.append((self.name, other.name))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Who waits for whom in a capture: the caller's stream and lanes by number."""
    found: list[tuple[str, str]] = []
    main, sides = Stream("main", found), [Stream(str(lane), found) for lane in range(4)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(beside, "_side_stream", lambda device, lane: sides[lane])
    return found


def test_a_lane_begins_once_and_meets_once(waits: list[tuple[str, str]]) -> None:
    with Beside(torch.device("cuda", 0), 2) as side:
        assert waits == []
        side.begin()
        side.run(lambda: None)
        assert waits == [("2", "main")]
        side.meet()
        assert waits == [("2", "main"), ("main", "2")]
    assert len(waits) == 2, "it has met"


def test_lanes_meet_also_where_one_fails(waits: list[tuple[str, str]]) -> None:
    done = []
    with pytest.raises(ValueError, match="broken"), abreast(torch.device("cuda", 0), 3) as run:
        run(lambda: done.append(1))
        run(lambda: int("broken"))
    assert done == [1]
    assert waits[:2] == [("0", "main"), ("1", "main")]
    assert sorted(waits[2:]) == [("main", "0"), ("main", "1")], "no capture can end before"


def test_lanes_take_turns(waits: list[tuple[str, str]]) -> None:
    with abreast(torch.device("cuda", 0), 2) as run:
        for _ in range(5):
            run(lambda: None)
    assert waits[:2] == [("0", "main"), ("1", "main")] and sorted(waits[2:]) == [("main", "0"), ("main", "1")]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="a graph needs a GPU")
def test_lanes_of_a_capture_compute_what_one_stream_does() -> None:
    x = torch.randn(6, 64, 64, device=DEVICE)
    out = torch.zeros_like(x)

    def launch() -> None:
        with abreast(DEVICE, 4) as run:
            for number in range(len(x)):
                run(lambda number=number: out[number].copy_((x[number] @ x[number]).relu()))
        out.add_(1.0)

    launch()
    wanted = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    out.zero_()
    graph.replay()
    assert torch.allclose(out, wanted)
