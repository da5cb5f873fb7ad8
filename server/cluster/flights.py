"""A request on its way through the cluster, as its gateway knows it."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from server.scheduler.slots import Slot
from server.scheduler.stream import RequestStream, StreamItem
from server.worker import messages


@dataclass
class Flight:
    """One open request. `until`: monotonic seconds; `tried`: replicas that it is not sent to again; `streamed`: a part
    of its answer went to the client, so it cannot begin anew; `ident`: its name with the replica that it was sent to
    last, so that what others still say of it is not taken for an answer."""

    slot: Slot
    message: messages.Submit | messages.Tokenize
    stream: RequestStream
    until: float
    blocks: tuple[int, ...] = ()
    tokens: float = 0.0
    replica: str = ""
    node: str = ""
    accepted: bool = False
    streamed: bool = False
    crashes: int = 0
    ident: str = ""
    times: int = 0
    tried: set[str] = field(default_factory=set)

    @property
    def chat(self) -> tuple[str, str, str] | None:
        """Which chat it belongs to: model, salt and name; None for none."""
        message = self.message
        if not isinstance(message, messages.Submit) or message.session is None:
            return None
        return self.slot.name, message.cache_salt, message.session

    def anew(self) -> messages.Submit | messages.Tokenize:
        """The message for another replica, under another name."""
        self.ident = f"{self.message.request_id}.{self.times}" if self.times else self.message.request_id
        self.times += 1
        return msgspec.structs.replace(self.message, request_id=self.ident)

    def takes(self, message: StreamItem) -> bool:
        """Whether a message belongs to the stream; a second Accepted, of a request that was sent again, does not."""
        if isinstance(message, messages.Accepted):
            again, self.accepted = self.accepted, True
            return not again
        if isinstance(message, (messages.Delta, messages.Finished)):
            self.streamed = True
        return True


def texts_of(message: messages.Submit | messages.Tokenize) -> list[str]:
    """The text that a prompt is made of, in order; tools first, as templates write them."""
    tools = [str(tool) for tool in message.tools]
    if message.kind == "chat":
        return [*tools, *(f"{turn.role}:{turn.content}" for turn in message.messages)]
    prompt = message.prompt
    return [prompt if isinstance(prompt, str) else " ".join(map(str, prompt))]
