"""What runs beside a captured step runs in its order where nothing is captured (streams: on a GPU, by its benches)."""

from __future__ import annotations

import pytest
import torch

from spectral.beside import Beside, abreast

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_outside_of_a_capture_everything_runs_in_its_order() -> None:
    done = []
    with Beside(DEVICE) as beside:
        beside.begin()
        done.append("before")
        beside.run(lambda: done.append("beside"))
        done.append("after")
        beside.meet()
    with abreast(DEVICE, 3) as run:
        for number in range(5):
            run(lambda number=number: done.append(number))
    assert done == ["before", "beside", "after", 0, 1, 2, 3, 4]


def test_lanes_meet_also_where_one_fails() -> None:
    with pytest.raises(ValueError, match="broken"), abreast(DEVICE, 2) as run:
        run(lambda: None)
        run(lambda: int("broken"))
    with Beside(DEVICE, 1) as beside:
        beside.run(lambda: None)
    assert not beside._apart or beside._main is None


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
