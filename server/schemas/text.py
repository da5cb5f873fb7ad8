"""Bodies of POST /v1/completions, /generate, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from server.errors import bad_request
from server.schemas.base import Harmless, Request
from server.schemas.chat import ChatMessage, ChatRequest
from server.schemas.fields import MAX_TOKEN_ID, MAX_TOKENS, MAX_TOOLS, Limit, ModelName, Prompt, Prompts
from server.schemas.sampling import COMMON_HARMLESS, OpenAIFields, SamplingFields
from server.schemas.structured import StructuredOutputs, answer_grammar, grammar_field
from server.schemas.tools import Tool, ToolUse
from server.worker import messages as wire


class CompletionRequest(OpenAIFields):
    """POST /v1/completions; 16 tokens where max_tokens is not given, as the API has it, and none (0) only with echo."""

    harmless: ClassVar[Harmless] = {
        **COMMON_HARMLESS,
        "best_of": lambda value: value == 1 and value is not True,
        "suffix": lambda value: value == "",
    }

    prompt: Prompts
    max_tokens: int | None = Field(16, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False

    def split(self) -> list[CompletionRequest]:
        """One request for each prompt. Raises ApiError 400 where they would share a session."""
        if self.session is not None and len(self.prompt) > 1:
            raise bad_request("session: needs exactly one prompt", "session")
        return [self.model_copy(update={"prompt": [prompt]}) for prompt in self.prompt]

    def submit(self, request_id: str) -> wire.Submit:
        """The message to the worker, for the first prompt."""
        if self.max_tokens == 0 and not self.echo:
            raise bad_request("max_tokens: must be at least 1, or 0 with echo", "max_tokens")
        # One token is the least that is generated; with max_tokens 0 it is not shown.
        limit = None if self.max_tokens is None else max(1, self.max_tokens)
        prompt = self.prompt[0]
        shown = self.echo and (self.logprobs is not None or not isinstance(prompt, str))
        sampling = self.sampling(
            n=self.n,
            logprobs=self.logprobs,
            max_tokens=limit,
            prompt_logprobs=(self.logprobs or 0) if shown else None,
            grammar=answer_grammar(self.response_format, self.structured_outputs),
        )
        return wire.Submit(request_id, "completion", sampling, prompt=prompt, **self.service)


class GenerateRequest(SamplingFields):
    """POST /generate and /generate_stream: plain text continuation."""

    prompt: Prompt
    max_tokens: Limit | None = 128
    structured_outputs: StructuredOutputs | None = None

    @property
    def grammar_field(self) -> str:
        """The field whose grammar it is, should a worker not be able to use it."""
        return grammar_field(self.structured_outputs)

    def submit(self, request_id: str) -> wire.Submit:
        """The message to the worker."""
        sampling = self.sampling(max_tokens=self.max_tokens, grammar=answer_grammar(None, self.structured_outputs))
        return wire.Submit(request_id, "completion", sampling, prompt=self.prompt, **self.service)


class TokenizeRequest(Request):
    """POST /tokenize: a text, or a conversation as the chat template writes it."""

    model: ModelName
    prompt: str | None = Field(None, min_length=1)
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)

    @classmethod
    def prepare(cls, data: dict[str, Any]) -> dict[str, Any]:
        """As in a chat."""
        return ChatRequest.prepare(data)

    def message(self, request_id: str) -> wire.Tokenize:
        """The message to the worker. Raises ApiError 400."""
        if (self.prompt is None) == (self.messages is None):
            raise bad_request("prompt: give either prompt or messages", "prompt")
        if self.prompt is not None:
            if self.tools:
                raise bad_request("tools: needs messages", "tools")
            return wire.Tokenize(request_id, "completion", self.prompt)
        turns = [turn.to_wire(f"messages[{place}]") for place, turn in enumerate(self.messages or [])]
        return wire.Tokenize(request_id, "chat", messages=turns, tools=ToolUse(self.tools, None, True).described)


TokenId = Annotated[int, Field(ge=0, lt=MAX_TOKEN_ID)]


class DetokenizeRequest(Request):
    """POST /detokenize: token ids."""

    model: ModelName
    tokens: list[TokenId] = Field(min_length=1)

    def message(self, request_id: str) -> wire.Tokenize:
        """The message to the worker."""
        return wire.Tokenize(request_id, "ids", self.tokens)
