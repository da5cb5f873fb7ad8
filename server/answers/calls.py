"""A generation's items with calls of tools taken out of the text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

import msgspec

from server.gateway import Generation
from server.schemas.tools import ToolUse
from server.toolcalls import Call, ToolParser
from server.worker import messages


@dataclass(frozen=True)
class CalledTool:
    """Choice `index` calls a tool: its call number `number`, from 0."""

    index: int
    number: int
    call: Call


Item = messages.Delta | messages.Finished | CalledTool


def items(generation: Generation, tools: ToolUse | None, choices: int = 1) -> AsyncIterator[Item]:
    """Text, calls and ends. An end after calls has the reason "tool_calls", also in the generation."""
    return _with_calls(generation, tools, choices) if tools else generation.items()


async def _with_calls(generation: Generation, tools: ToolUse, choices: int) -> AsyncIterator[Item]:
    how = {"parallel": tools.parallel, "forced": tools.forced, "strict": tools.strict}
    parsers = [ToolParser(generation.tool_format, tools.names, **how) for _ in range(choices)]
    numbers = [0] * choices
    async for item in generation.items():
        index, parser = item.index, parsers[item.index]
        logprobs = item.logprobs if isinstance(item, messages.Delta) else None
        for found in parser.push(item.text) if isinstance(item, messages.Delta) else parser.finish():
            if isinstance(found, Call):
                yield CalledTool(index, numbers[index], found)
                numbers[index] += 1
            else:
                yield messages.Delta(generation.request_id, index, found, [], logprobs)
                logprobs = None
        if logprobs:  # of tokens whose text is held back, or is a call
            yield messages.Delta(generation.request_id, index, "", [], logprobs)
        if isinstance(item, messages.Finished):
            if parser.calls and item.reason == "stop":
                generation.finish_reasons[index] = "tool_calls"
                item = msgspec.structs.replace(item, reason="tool_calls")
            yield item
