"""Connections between gateways and agents: who may connect, what ends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.cluster import link, wire
from server.worker import messages


async def end(connection: link.Link[Any]) -> None:
    connection.close()
    with contextlib.suppress(ConnectionError):
        await connection._writer.wait_closed()


@asynccontextmanager
async def agent(token: str, serve: Callable[[Any], Any]) -> AsyncIterator[tuple[str, list[Exception]]]:
    """Something that listens as an agent does; its address, and what it refused."""
    refused: list[Exception] = []
    tasks = []

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.append(asyncio.current_task())
        try:
            accepted = await link.accept(reader, writer, token)
        except link.NotTrusted as error:
            refused.append(error)
            return
        await serve(accepted)
        await end(accepted)

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", refused
    finally:
        server.close()
        await asyncio.gather(*(task for task in tasks if task is not None), return_exceptions=True)


async def echo(accepted: link.Link[wire.ToAgent]) -> None:
    while (message := await accepted.receive()) is not None:
        if isinstance(message, wire.Drop):
            for part in "abc":
                accepted.send(messages.Delta(message.request_id, 0, part))


async def deltas(connection: link.Link[wire.ToGateway], count: int) -> str:
    text = ""
    while len(text) < count:
        message = await connection.receive()
        assert message is not None
        text += message.text if isinstance(message, messages.Delta) else ""
    return text


async def test_both_ends_know_the_token_and_messages_keep_their_order() -> None:
    async with agent("secret", echo) as (address, refused):
        connection = await link.dial(address, "secret")
        connection.send(wire.Drop("r"))
        assert await deltas(connection, 3) == "abc" and not refused
        await end(connection)
        await end(connection)


async def test_another_token_is_refused_by_the_agent() -> None:
    async with agent("secret", echo) as (address, refused):
        with pytest.raises(link.NotTrusted):
            await link.dial(address, "guess")
        while not refused:
            await asyncio.sleep(0)
        assert "token" in str(refused[0]) and "secret" not in str(refused[0])


async def test_an_agent_that_does_not_know_the_token_is_refused_by_the_gateway() -> None:
    over = asyncio.Event()

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(link.MAGIC + bytes(link.NONCE))
        await reader.readexactly(link.NONCE + link.DIGEST)
        writer.write(bytes(link.DIGEST))
        await reader.read()
        writer.close()
        await writer.wait_closed()
        over.set()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    with pytest.raises(link.NotTrusted, match="agent does not know"):
        await link.dial(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "secret")
    await over.wait()
    server.close()


@pytest.mark.parametrize("body", [b"zz", b"\x81\xa4type\xa2\xff\xfe", b"\x91" * 5_000, b""])
def test_whatever_comes_is_a_message_or_a_bad_frame(body: bytes) -> None:
    reads = [wire.to_agent, wire.to_gateway, wire.command, lambda found: wire.unpack(found, wire.Report)]
    for read in reads:
        with pytest.raises(link.BadFrame):
            read(body)


async def test_bad_bytes_and_silence_end_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async def bad(accepted: link.Link[Any]) -> None:
        accepted._writer.write(b"\x00\x00\x00\x02zz")
        await accepted._writer.drain()

    async with agent("secret", bad) as (address, _):
        connection = await link.dial(address, "secret")
        with pytest.raises(link.BadFrame):
            while await connection.receive() is not None:
                pass
        await end(connection)

    monkeypatch.setattr(link, "SILENCE_S", 0.05)
    monkeypatch.setattr(link, "BEAT_S", 60.0)

    async def mute(accepted: link.Link[Any]) -> None:
        assert await accepted.receive() is not None  # the first beat

    async with agent("secret", mute) as (address, _):
        connection = await link.dial(address, "secret")
        while await connection.receive() is not None:
            pass
        await end(connection)


async def test_nobody_there() -> None:
    with pytest.raises(OSError):
        await link.dial("127.0.0.1:1", "secret")
