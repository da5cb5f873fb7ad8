"""What gateways, node agents and the conductor say to each other: msgspec structs, msgpack, never pickled objects.

Two planes:
    data     gateway <-> agent over a TCP connection of their own (link.py): requests out, tokens back
    control  agent -> conductor (Report, answered by Orders) and gateway -> conductor (Ask, answered by Table), as bytes
             in an actor call; prompts and answers are never in them

Times are seconds, sizes are bytes.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

from server.worker import messages as worker
from server.worker.memory_messages import SetProfile, SetSetting
from server.worker.messages import decoded, framed

T = TypeVar("T")

# ---------------------------------------------------------------------------------------------- shared parts


class ReplicaState(msgspec.Struct, frozen=True, omit_defaults=True):
    """One replica on one node. `state` as on a single machine; `streams`: requests that it has; `lease`: KV bytes."""

    replica: str
    model: str
    state: str = "cold"
    device: str = ""
    stage: str = ""
    error: str = ""
    restarts: int = 0
    streams: int = 0
    waiting: int = 0
    lease: int = 0
    retiring: bool = False
    ready: worker.Ready | None = None
    stats: worker.Stats = worker.Stats()


class DeviceState(msgspec.Struct, frozen=True):
    """A device of a node. `budget`: bytes that may be ours, those of our own workers included."""

    name: str
    budget: int
    total: int = 0
    label: str = ""


class Assignment(msgspec.Struct, frozen=True, omit_defaults=True):
    """A replica that a node shall serve. `settings`: its entry of the configuration, with what was chosen since."""

    replica: str
    model: str
    device: str
    settings: dict[str, Any]
    setting: str | None = None
    profile: str | None = None
    pinned: bool = False


# ---------------------------------------------------------------------------------------------- gateway -> agent


class Forward(msgspec.Struct, tag="forward", frozen=True, omit_defaults=True):
    """A request for a replica. `seconds`: what is left of its time. `session_at`: the agent ("host:port") on which
    `session_replica` has, or had, the cache of this request's chat: it is fetched from there first."""

    replica: str
    message: worker.Submit | worker.Tokenize
    seconds: float
    session_at: str = ""
    session_replica: str = ""


class Drop(msgspec.Struct, tag="drop", frozen=True):
    """Nobody reads this request any more."""

    request_id: str


class Tell(msgspec.Struct, tag="tell", frozen=True):
    """A command for a replica's worker; answered by Done with the command's id."""

    replica: str
    command: SetSetting | SetProfile


class Fetch(msgspec.Struct, tag="fetch", frozen=True):
    """One agent asks another for a chat's cache; answered by Pieces with the same id."""

    ident: str
    replica: str
    session: str
    cache_salt: str = ""


class Beat(msgspec.Struct, tag="beat", frozen=True):
    """I live. Both sides send it; silence ends a connection."""

    seq: int = 0


# ---------------------------------------------------------------------------------------------- agent -> gateway


class Board(msgspec.Struct, tag="board", frozen=True):
    """Everything that a node serves, sent when it changes and about four times a second while there is work.
    `vram`: the node's devices as GET /admin/vram shows them."""

    node: str
    replicas: list[ReplicaState]
    vram: list[dict[str, Any]] = []


class Gone(msgspec.Struct, tag="gone", frozen=True):
    """A request ended here without its end: its worker is gone (`crash`), or does not take it. It may be sent elsewhere
    as long as nothing of it has been streamed."""

    request_id: str
    why: str
    crash: bool = False


class Piece(msgspec.Struct, tag="piece", frozen=True):
    """A part of a chat's cache. `last`: nothing follows; `error`: why there is nothing."""

    ident: str
    data: bytes = b""
    last: bool = False
    error: str = ""


ToAgent = Forward | Drop | Tell | Fetch | Beat
ToGateway = worker.Told | Board | Gone | Piece | Beat | worker.Done

# ---------------------------------------------------------------------------------------------- control


class Report(msgspec.Struct, frozen=True):
    """An agent's report. `life`: a name for this run of the agent; `seen`: the version of the last orders."""

    node: str
    life: str
    address: str
    devices: list[DeviceState]
    replicas: list[ReplicaState]
    seen: int = 0


class Orders(msgspec.Struct, frozen=True):
    """What the node shall serve, complete."""

    version: int
    assignments: list[Assignment]


class Ask(msgspec.Struct, frozen=True):
    """A gateway's question. `requests`: how many came for each model since the last one; `waiting`: those that wait for
    a model that is nowhere hot; `seen`: the version of the last table; `wait`: seconds until it wants an answer;
    `broken`: nodes whose link ended and that do not take another one."""

    gateway: str
    requests: dict[str, int] = {}
    waiting: dict[str, int] = {}
    seen: int = 0
    wait: float = 1.0
    broken: list[str] = []


class NodeInfo(msgspec.Struct, frozen=True):
    """A node as gateways see it."""

    node: str
    address: str
    draining: bool = False
    host: str = ""
    devices: list[DeviceState] = []
    replicas: list[str] = []


class Table(msgspec.Struct, frozen=True):
    """Where everything is. `stages`: why a model is nowhere hot; `plan`: the last plan, JSON-ready."""

    version: int
    nodes: list[NodeInfo]
    stages: dict[str, str] = {}
    plan: dict[str, Any] = {}


class Choice(msgspec.Struct, tag="choice", frozen=True):
    """What an administrator chose for a model."""

    model: str
    pinned: bool = False
    setting: str | None = None
    profile: str | None = None


class Release(msgspec.Struct, tag="release", frozen=True):
    """End all replicas of a model; it stays cold until somebody asks for it."""

    model: str


class Drain(msgspec.Struct, tag="drain", frozen=True):
    """Serve a node's models elsewhere and give it no more; with `on` false, use it again."""

    node: str
    on: bool = True


class Configure(msgspec.Struct, tag="configure", frozen=True):
    """The configuration of a gateway that starts: its models and sections, as in config.yaml. `server`: only the times
    that concern workers."""

    models: list[dict[str, Any]]
    cluster: dict[str, Any]
    memory: dict[str, Any] = {}
    server: dict[str, Any] = {}


Command = Choice | Release | Drain | Configure


class Answer(msgspec.Struct, frozen=True):
    """What came of a command; `error` says why nothing did."""

    error: str = ""


# ---------------------------------------------------------------------------------------------- bytes

_encoder = msgspec.msgpack.Encoder()
_to_agent: msgspec.msgpack.Decoder[ToAgent] = msgspec.msgpack.Decoder(ToAgent)
_to_gateway: msgspec.msgpack.Decoder[ToGateway] = msgspec.msgpack.Decoder(ToGateway)
_command: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)


def pack(value: Any) -> bytes:
    """A struct of this module as bytes, without a length."""
    return _encoder.encode(value)


def frame(value: Any) -> bytes:
    """One whole frame: length and body. Raises BadFrame for a body over MAX_FRAME_BYTES."""
    return framed(_encoder.encode(value))


def to_agent(body: bytes) -> ToAgent:
    """A frame's body as an agent receives it. Raises BadFrame."""
    return decoded(_to_agent, body, "a message to an agent")


def to_gateway(body: bytes) -> ToGateway:
    """A frame's body as a gateway receives it. Raises BadFrame."""
    return decoded(_to_gateway, body, "a message to a gateway")


def command(body: bytes) -> Command:
    """A command for the conductor. Raises BadFrame."""
    return decoded(_command, body, "a command")


def unpack(body: bytes, kind: type[T]) -> T:
    """A struct of the control plane. Raises BadFrame."""
    return decoded(msgspec.msgpack.Decoder(kind), body, f"a {kind.__name__}")
