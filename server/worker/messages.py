"""What the gateway and a worker say to each other: msgspec structs as msgpack, each behind a 4-byte big-endian length.

A frame that cannot be decoded raises :class:`BadFrame`: a worker then ends, and the gateway replaces the worker. Both
ends of the socket: server/worker/channel.py.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any, TypeVar

import msgspec

from server.worker.memory_messages import Footprint, SetLease, SetProfile, SetSetting, Sleep, Wake
from server.worker.parts import Grammar as Grammar
from server.worker.parts import LadderFigure, Limits, Message, Sampling, TokenLogprob, Usage
from server.worker.parts import TopLogprob as TopLogprob
from server.worker.session_messages import ResumeSession, SavedSessions, SaveSession

MAX_FRAME_BYTES = 64 * 1024 * 1024
LENGTH = struct.Struct(">I")
T = TypeVar("T")


class BadFrame(Exception):
    """Bytes on the worker's socket that are no message of this protocol."""


# ---------------------------------------------------------------------------------------------- parent -> worker


class Load(msgspec.Struct, tag="load", frozen=True):
    """The first message: which model to load and how. `setting` may be "auto". `cold_level`: how sessions are saved;
    `sessions`: where, when the worker ends (None: nowhere)."""

    name: str
    path: str
    quantization: str = "none"
    dtype: str = "auto"
    device: str = "auto"
    setting: str = "auto"
    profile: str | None = None
    limits: Limits = Limits()
    threads: int = 1
    trust_remote_code: bool = False
    max_memory: dict[str, int] = {}
    """Bytes by device for weights and cache, where the model is spread over several; {}: all on `device`."""
    cold_level: str = "fast"
    sessions: SavedSessions | None = None


class Submit(msgspec.Struct, tag="submit", frozen=True):
    """A request. kind "chat": `messages` and `tools` (as OpenAI has them); kind "completion": `prompt` (text, ids).

    `timeout_s`: it fails with deadline_exceeded if it has not ended by then. `max_kl`: how far the cache's setting may
    be from the exact cache (mean KL, nats); `setting`: which it is. `tenant`: on whose behalf; `cache_salt`: who shares
    prefixes and sessions with it. `priority`: higher ones run first. `session`: keep the cache under this name.
    `queue_s`: it fails with queue_timeout if it has not begun by then. `thinking`: with thoughts before it, without.
    """

    request_id: str
    kind: str
    sampling: Sampling
    messages: list[Message] = []
    prompt: str | list[int] = ""
    tools: list[dict[str, Any]] = []
    timeout_s: float | None = None
    max_kl: float | None = None
    tenant: str = ""
    cache_salt: str = ""
    priority: int = 0
    setting: str | None = None
    session: str | None = None
    queue_s: float | None = None
    thinking: bool | None = None


class Tokenize(msgspec.Struct, tag="tokenize", frozen=True):
    """Turn a text into tokens or back, without generating; answered by Tokenized or Rejected.

    kind "completion": `prompt`, a text; "chat": `messages` and `tools` through the chat template; "ids": `prompt`, ids.
    """

    request_id: str
    kind: str
    prompt: str | list[int] = ""
    messages: list[Message] = []
    tools: list[dict[str, Any]] = []


class Cancel(msgspec.Struct, tag="cancel", frozen=True):
    """Stop this request before the next step and free its pages. An unknown id is ignored."""

    request_id: str


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Are you there; answered by Pong with the same `seq`, from a thread that a long step does not hold up."""

    seq: int


class Shutdown(msgspec.Struct, tag="shutdown", frozen=True):
    """Finish what runs within `deadline_s` seconds, save sessions (see Load), then end with status 0."""

    deadline_s: float = 0.0


# ---------------------------------------------------------------------------------------------- worker -> parent


class Loading(msgspec.Struct, tag="loading", frozen=True):
    """How far the load is; `fraction` in 0..1."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The model is hot. Bytes per token are averages at `reference_context` tokens; KL in nats, mean."""

    context_length: int
    setting: str
    rank: float = 0.0
    bits_per_element: float = 16.0
    kl_mean: float = 0.0
    bytes_per_token: float = 0.0
    bytes_per_token_exact: float = 0.0
    reference_context: int = 2048
    weights_bytes: int = 0
    parameters: int = 0
    device: str = "cpu"
    shares: dict[str, float] = {}
    """Each device's part of the weights, where the model is spread over several; {}: all on `device`."""
    dtype: str = "float32"
    quantization: str = "none"
    chat_template: bool = True
    tool_format: str = ""
    """How the chat template writes calls of tools: "hermes", "mistral", "json"; "" where it does not know tools."""
    thought_format: str = ""
    """How the model marks the thoughts before its answers; "" where it has none."""
    eos_token_ids: list[int] = []
    vocab_size: int = 0
    profile_id: str = ""
    fingerprint: str = ""
    ladder: list[LadderFigure] = []


class LoadFailed(msgspec.Struct, tag="load_failed", frozen=True):
    """The model cannot be loaded; the worker ends after it. `permanent`: trying again would fail the same way."""

    message: str
    permanent: bool = True


class Accepted(msgspec.Struct, tag="accepted", frozen=True):
    """The request is queued or running, at a setting of the cache ("": the model's); sent before any Delta.

    `thinks`: the prompt ends within thoughts, so the answer begins with them and without their mark.
    """

    request_id: str
    prompt_tokens: int
    setting: str = ""
    thinks: bool = False


class Rejected(msgspec.Struct, tag="rejected", frozen=True):
    """The request does not start. `status` is the HTTP status (400, 429, ...); nothing follows for this id."""

    request_id: str
    status: int
    code: str
    message: str
    param: str | None = None


class Tokenized(msgspec.Struct, tag="tokenized", frozen=True):
    """Token ids, and the text that they decode to (special tokens included)."""

    request_id: str
    tokens: list[int]
    text: str


class PromptTokens(msgspec.Struct, tag="prompt_tokens", frozen=True):
    """The prompt's text and tokens, where `prompt_logprobs` asked for them; before the first Delta.

    `first`: the text of its first token, which nothing predicts; `logprobs`: all other tokens.
    """

    request_id: str
    text: str
    first: str
    logprobs: list[TokenLogprob]


class Delta(msgspec.Struct, tag="delta", frozen=True):
    """New text of choice `index`. `text` may be empty where tokens do not make whole characters yet."""

    request_id: str
    index: int
    text: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprob] | None = None


class Finished(msgspec.Struct, tag="finished", frozen=True):
    """Choice `index` ended: "stop", "length" or "cancelled". The request is over when each of its n choices ended."""

    request_id: str
    index: int
    reason: str
    usage: Usage = Usage()


class Failed(msgspec.Struct, tag="failed", frozen=True):
    """The whole request failed after Accepted; nothing follows for this id. `param`: the field at fault, if one is."""

    request_id: str
    message: str
    code: str = "internal_error"
    param: str | None = None


class Pong(msgspec.Struct, tag="pong", frozen=True):
    """Answer to Ping."""

    seq: int


class Done(msgspec.Struct, tag="done", frozen=True):
    """A command was carried out or, with an error, nothing was changed."""

    command_id: str
    error: str = ""


class Stats(msgspec.Struct, tag="stats", frozen=True):
    """A snapshot, about once a second while there is work and after each change to idle. Counters since the start.

    `prefix_asked`, `prefix_reused`: prompt tokens, and those that an earlier prompt had left in the cache.
    `reserved_bytes`: all that torch holds on GPUs; `beside_bytes`: the most of it beside weights and cache.
    `sessions`: paused chats in host memory.
    """

    running: int = 0
    queued: int = 0
    kv_bytes_allocated: int = 0
    kv_bytes_used: int = 0
    kv_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = {}
    prefix_asked: int = 0
    prefix_reused: int = 0
    prefix_bytes: int = 0
    parked: int = 0
    parked_bytes: int = 0
    preemptions: int = 0
    squeezes: int = 0
    reserved_bytes: int = 0
    beside_bytes: int = 0
    sessions: int = 0


MemoryCommand = SetLease | SetSetting | Sleep | Wake
Session = SaveSession | ResumeSession
ToWorker = Load | Submit | Tokenize | Cancel | SetProfile | Ping | Shutdown | MemoryCommand | Session
Told = Accepted | Rejected | Tokenized | PromptTokens | Delta | Finished | Failed
ToParent = Loading | Ready | LoadFailed | Told | Pong | Done | Footprint | Stats
AnyMessage = ToWorker | ToParent

# Text that is no UTF-8 raises UnicodeDecodeError (a ValueError), nesting without end RecursionError.
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)
_encoder = msgspec.msgpack.Encoder()
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_parent: msgspec.msgpack.Decoder[ToParent] = msgspec.msgpack.Decoder(ToParent)


# ---------------------------------------------------------------------------------------------- framing


def encode(message: AnyMessage) -> bytes:
    """One whole frame: length and body. Raises BadFrame where the body is over MAX_FRAME_BYTES."""
    return framed(_encoder.encode(message))


def framed(body: bytes) -> bytes:
    """A body behind its length. Raises BadFrame where it is over MAX_FRAME_BYTES."""
    if len(body) > MAX_FRAME_BYTES:
        raise BadFrame(f"a message of {len(body)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return LENGTH.pack(len(body)) + body


def body_length(head: bytes) -> int:
    length: int = LENGTH.unpack(head)[0]
    if length > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame announces {length} bytes, over the limit of {MAX_FRAME_BYTES}")
    return length


def decode_to_parent(body: bytes) -> ToParent:
    """A frame's body as the gateway receives it. Raises BadFrame."""
    return decoded(_to_parent, body, "a message to the gateway")


def decode_to_worker(body: bytes) -> ToWorker:
    """A frame's body as a worker receives it. Raises BadFrame."""
    return decoded(_to_worker, body, "a message to a worker")


def decoded(decoder: msgspec.msgpack.Decoder[T], body: bytes, what: str) -> T:
    """What a decoder makes of bytes from elsewhere. Raises BadFrame, whatever they are; `what` they should be."""
    try:
        return decoder.decode(body)
    except _UNREADABLE as error:
        raise BadFrame(f"not {what}: {error}") from error


def write_message(writer: asyncio.StreamWriter, message: ToWorker) -> None:
    """Queue one message to the worker; it does not wait: prompts are bounded by the body limit."""
    writer.write(encode(message))
