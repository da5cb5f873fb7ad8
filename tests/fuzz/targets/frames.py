"""Messages between gateway and workers: frames changed in structure and in bytes, split in any way."""

from __future__ import annotations

import asyncio
import socket
from random import Random
from typing import Any

import msgspec

from server.worker import child_wire
from server.worker import messages as wire
from server.worker.channel import MessageReader, SocketChannel
from server.worker.memory_messages import Footprint, SetLease, SetProfile, SetSetting, Sleep, Wake
from spectral.errors import RequestError
from tests.fuzz.mutate import mutate_bytes, mutate_document
from tests.fuzz.targets.base import Base

SAMPLING = wire.Sampling(max_tokens=5, stop=("x",), logit_bias={3: 1.0}, grammar=wire.Grammar("regex", "a+"))
TO_WORKER: list[Any] = [
    wire.Load("m", "demo-7m"),
    wire.Submit("r", "chat", SAMPLING, [wire.Message("user", "hi")], tools=[{"type": "function"}], max_kl=0.1),
    wire.Submit("r", "completion", SAMPLING, prompt=[1, 2, 3], timeout_s=1.0, tenant="t", cache_salt="s"),
    wire.Tokenize("r", "ids", [1, 2]),
    wire.Cancel("r"),
    wire.Ping(1),
    wire.Shutdown(1.0),
    SetProfile("c", None, "8x"),
    SetLease("c", 1000),
    SetSetting("c", "8x"),
    Sleep("c"),
    Wake("c"),
]
TO_PARENT: list[Any] = [
    wire.Loading("weights", 0.5),
    wire.Ready(128, "8x", ladder=[wire.LadderFigure("8x", 2.0, 0.1, 8.0)]),
    wire.LoadFailed("no"),
    wire.Accepted("r", 5),
    wire.Rejected("r", 400, "invalid_value", "no"),
    wire.Tokenized("r", [1], "a"),
    wire.Delta("r", 0, "text", [1], [wire.TokenLogprob("a", -1.0, [97], [wire.TopLogprob("b", -2.0)])]),
    wire.Finished("r", 0, "stop", wire.Usage(5, 1, 64, "8x")),
    wire.Failed("r", "broken"),
    wire.Pong(1),
    wire.Done("c"),
    Footprint(freed_bytes=5),
    wire.Stats(running=1, finished={"stop": 3}),
]


class Frames(Base):
    """Either end gets a message or BadFrame, whatever comes; the gateway does not lose what came before."""

    name = "frames"

    def make(self, random: Random) -> tuple[bool, bytes, int]:
        """(to the gateway, bytes on the socket, size of the pieces that arrive)."""
        to_parent = random.random() < 0.5
        message = random.choice(TO_PARENT if to_parent else TO_WORKER)
        if random.random() < 0.6:
            plain = mutate_document(msgspec.to_builtins(message), random, ("type", "request_id"))
            try:
                body = msgspec.msgpack.encode(plain)
            except (OverflowError, UnicodeEncodeError, TypeError):
                body = b"\xc1"
            frame = len(body).to_bytes(4, "big") + body
        else:
            frame = mutate_bytes(wire.encode(message), random)
        return to_parent, frame, random.choice((1, 3, 64, 1 << 20))

    def check(self, item: tuple[bool, bytes, int]) -> str:
        """Receive it."""
        to_parent, frame, piece = item
        return _gateway(frame, piece) if to_parent else _worker(frame)


def _gateway(frame: bytes, piece: int) -> str:
    before = wire.encode(wire.Pong(7))

    async def receive() -> str:
        stream = asyncio.StreamReader()
        data = before + frame
        for at in range(0, len(data), max(piece, len(data) // 50)):
            stream.feed_data(data[at : at + max(piece, len(data) // 50)])
        stream.feed_eof()
        reader, taken = MessageReader(stream), []
        try:
            while part := await reader.take():
                taken += part
        except wire.BadFrame:
            assert taken[:1] == [wire.Pong(7)], "what came before was lost"
            return "refused"
        assert taken[:1] == [wire.Pong(7)], "what came before was lost"
        return "cut short" if len(taken) == 1 else "accepted"

    return asyncio.run(receive())


def _worker(frame: bytes) -> str:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frame)
        ours.shutdown(socket.SHUT_WR)
        channel = SocketChannel(theirs)
        try:
            message = channel.receive()
        except wire.BadFrame:
            return "refused"
        if isinstance(message, (wire.Submit, wire.Tokenize)):
            try:
                make = child_wire.to_request if isinstance(message, wire.Submit) else child_wire.to_encode
                make(message)  # type: ignore[operator]
                child_wire.text_length(message)
            except RequestError:
                return "refused"
        return "cut short" if message is None else "accepted"


TARGETS = {"frames": Frames}
