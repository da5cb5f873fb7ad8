"""Connections between gateways and agents: who may connect, what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from server.cluster import link, trust, wire
from server.worker import messages

SECRET, OTHER = trust.make(), trust.make()


async def end(connection: link.Link[Any]) -> None:
    connection.close()
    with contextlib.suppress(OSError):
        await connection._writer.wait_closed()


@asynccontextmanager
async def agent(serve: Callable[[Any], Any]) -> AsyncIterator[tuple[str, list[Any]]]:
    """Something that listens as an agent does; its address, and who was let in."""
    tasks, accepted = [], []

    async def connected(connection: link.Link[wire.ToAgent]) -> None:
        tasks.append(asyncio.current_task())
        accepted.append(connection)
        await serve(connection)
        await end(connection)

    server = await link.listen(connected, "127.0.0.1", 0, SECRET)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}", accepted
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


async def test_messages_keep_their_order() -> None:
    async with agent(echo) as (address, accepted):
        connection = await link.dial(address, SECRET)
        connection.send(wire.Drop("r"))
        assert await deltas(connection, 3) == "abc" and len(accepted) == 1
        await end(connection)
        await end(connection)


async def test_another_secret_is_refused() -> None:
    async with agent(echo) as (address, accepted):
        with pytest.raises(link.NotTrusted, match="secret") as refused:
            await link.dial(address, OTHER)
        assert "PRIVATE" not in str(refused.value) and not accepted


@pytest.mark.parametrize("shows", ["nothing", "another certificate"])
async def test_a_stranger_who_trusts_the_agent_gets_nothing(shows: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(OTHER)
        file.flush()
        if shows != "nothing":
            context.load_cert_chain(file.name)
    async with agent(echo) as (address, accepted):
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
        writer.write(wire.frame(wire.Drop("r")))
        with contextlib.suppress(OSError):
            assert await reader.read() == b""
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        assert not accepted


async def test_an_agent_that_speaks_without_tls_is_refused() -> None:
    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.frame(wire.Beat(1)))
        await reader.read()
        writer.close()

    server = await asyncio.start_server(impostor, "127.0.0.1", 0)
    with pytest.raises((link.NotTrusted, OSError)):
        await link.dial(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", SECRET)
    server.close()


async def test_who_listens_on_the_way_reads_nothing() -> None:
    seen = bytearray()

    async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            seen.extend(data)
            writer.write(data)
        writer.close()

    async with agent(echo) as (address, _):
        host, port = address.split(":")

        async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there = await asyncio.open_connection(host, int(port))
            await asyncio.gather(copy(reader, there[1]), copy(there[0], writer))

        tap = await asyncio.start_server(between, "127.0.0.1", 0)
        connection = await link.dial(f"127.0.0.1:{tap.sockets[0].getsockname()[1]}", SECRET)
        connection.send(wire.Drop("a request whose name is long"))
        assert await deltas(connection, 3) == "abc"
        await end(connection)
        tap.close()
    assert len(seen) > 1000 and b"a request whose name" not in seen


def test_what_is_no_secret_is_refused() -> None:
    for wrong in ("", "a token", SECRET[:200], SECRET[SECRET.index(trust.CERTIFICATE) :]):
        with pytest.raises(ValueError, match="no secret of a cluster"):
            trust.dialling(wrong)
    assert trust.make() != SECRET


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

    async with agent(bad) as (address, _):
        connection = await link.dial(address, SECRET)
        with pytest.raises(link.BadFrame):
            while await connection.receive() is not None:
                pass
        await end(connection)

    monkeypatch.setattr(link, "SILENCE_S", 0.05)
    monkeypatch.setattr(link, "BEAT_S", 60.0)

    async def mute(accepted: link.Link[Any]) -> None:
        assert await accepted.receive() is not None  # the first beat

    async with agent(mute) as (address, _):
        connection = await link.dial(address, SECRET)
        while await connection.receive() is not None:
            pass
        await end(connection)


async def test_nobody_there() -> None:
    with pytest.raises(OSError):
        await link.dial("127.0.0.1:1", SECRET)
