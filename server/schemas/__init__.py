"""What a request may say. Strict: an unknown field, a wrong type or a value out of range is a 400 that names it."""

from server.schemas.base import Request, Strict, parse
from server.schemas.chat import ChatRequest
from server.schemas.responses import ResponsesRequest
from server.schemas.text import CompletionRequest, DetokenizeRequest, GenerateRequest, TokenizeRequest

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "GenerateRequest",
    "Request",
    "ResponsesRequest",
    "Strict",
    "TokenizeRequest",
    "parse",
]
