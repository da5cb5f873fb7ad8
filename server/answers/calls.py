"""A generation's items with thoughts and calls of tools taken out of the text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from server.gateway import Generation
from server.schemas.tools import ToolUse
from server.thoughts import ThoughtReader
from server.toolcalls import Call, CallPart, ToolParser
from server.worker import messages


@dataclass(frozen=True)
class Thought:
    """More of what choice `index` thinks before its answer."""

    index: int
    text: str


@dataclass(frozen=True)
class CalledTool:
    """Choice `index` calls a tool: its call number `number`, from 0."""

    index: int
    number: int
    call: Call


@dataclass(frozen=True)
class CalledPart:
    """A part of such a call; `first`: the one with which it begins."""

    index: int
    number: int
    part: CallPart
    first: bool


Plain = messages.Delta | messages.Finished
Item = Plain | Thought | CalledTool | CalledPart


def items(
    generation: Generation, tools: ToolUse | None, choices: int = 1, *, live: bool = False
) -> AsyncIterator[Item]:
    """Thoughts, text, calls and ends. An end after calls has the reason "tool_calls", also in the generation.

    `live`: calls come in parts where they can, as they are written.
    """
    found = _apart(generation, choices) if generation.thought_format else generation.items()
    return _with_calls(generation, found, tools, choices, live) if tools else found


async def _apart(generation: Generation, choices: int) -> AsyncIterator[Plain | Thought]:
    readers = [ThoughtReader(generation.thought_format, begun=generation.thinks) for _ in range(choices)]
    # Of tokens that may be thoughts, while that is not decided.
    waiting: list[list[messages.TokenLogprob]] = [[] for _ in range(choices)]
    tokens = [0] * choices
    async for item in generation.items():
        index, reader = item.index, readers[item.index]
        within = reader.thinking
        if isinstance(item, messages.Delta) and reader.over:
            thoughts, text = reader.push(item.text)
        elif isinstance(item, messages.Delta):
            thoughts, text = reader.push(item.text)
            tokens[index] += len(item.token_ids)
            if within or reader.thinking:
                generation.thought_tokens += tokens[index]
                tokens[index] = 0
                waiting[index].clear()
            else:
                waiting[index] += item.logprobs or []
                item = msgspec.structs.replace(item, logprobs=waiting[index] or None)
        else:
            thoughts, text = reader.finish()
        if thoughts:
            yield Thought(index, thoughts)
        if isinstance(item, messages.Finished):
            if text:
                yield messages.Delta(generation.request_id, index, text, [], waiting[index] or None)
            yield item
        elif reader.over and (text or item.logprobs):
            # The token that ends the thoughts has none: what is told of a token is told of the answer's.
            yield msgspec.structs.replace(item, text=text, logprobs=None if within else item.logprobs)
            waiting[index] = []


async def _with_calls(
    generation: Generation, found: AsyncIterator[Plain | Thought], tools: ToolUse, choices: int, live: bool
) -> AsyncIterator[Item]:
    how = {"parallel": tools.parallel, "forced": tools.forced, "strict": tools.strict, "live": live}
    parsers = [ToolParser(generation.tool_format, tools.names, **how) for _ in range(choices)]
    numbers = [0] * choices
    begun: list[str | None] = [None] * choices
    async for item in found:
        if isinstance(item, Thought):
            yield item
            continue
        index, parser = item.index, parsers[item.index]
        logprobs = item.logprobs if isinstance(item, messages.Delta) else None
        for one in parser.push(item.text) if isinstance(item, messages.Delta) else parser.finish():
            if isinstance(one, Call):
                yield CalledTool(index, numbers[index], one)
                numbers[index] += 1
            elif isinstance(one, CallPart):
                yield CalledPart(index, numbers[index], one, first=begun[index] != one.id)
                begun[index] = one.id
                numbers[index] += one.end
            else:
                yield messages.Delta(generation.request_id, index, one, [], logprobs)
                logprobs = None
        if logprobs:  # of tokens whose text is held back, or is a call
            yield messages.Delta(generation.request_id, index, "", [], logprobs)
        if isinstance(item, messages.Finished):
            if parser.calls and item.reason == "stop":
                generation.finish_reasons[index] = "tool_calls"
                item = msgspec.structs.replace(item, reason="tool_calls")
            yield item
