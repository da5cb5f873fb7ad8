"""Every error that Spectral raises on purpose.

    SpectralError
    ├── ProfileError            a profile is damaged, or belongs to another model
    ├── SettingError            a setting that the profile's ladder does not have
    ├── CacheError              a cache was asked for something that it cannot do
    │   └── OutOfPages          the store has no room for this step
    ├── SessionError            a saved session is damaged, or belongs to another model, profile or setting
    ├── ModelError              a model cannot be loaded, or its architecture is not supported
    └── RequestError            one request is refused; nothing else is affected
        ├── ContextLengthExceeded
        ├── QueueFull
        ├── DeadlineExceeded
        └── BrokenNumbers

This module imports nothing heavy: the gateway uses it too.
"""

from __future__ import annotations


class SpectralError(Exception):
    """Base of all errors below. The message names what was wrong and what to do about it."""


class ProfileError(SpectralError):
    """A profile that cannot be read, is not valid, or was made for another model."""


class SettingError(SpectralError):
    """A setting that does not exist in the profile's ladder."""


class CacheError(SpectralError):
    """A cache was used in a way that it does not support."""


class OutOfPages(CacheError):
    """The page store would exceed its byte limit. Nothing was changed."""

    def __init__(self, needed_bytes: int, free_bytes: int) -> None:
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        super().__init__(
            f"the KV cache needs {needed_bytes} more bytes and {free_bytes} are free; "
            "raise limits.max_kv_bytes, choose a coarser setting, or run fewer sequences at once"
        )


class DamagedPages(CacheError):
    """A row that was kept in host memory is not what was put there: its checksum does not match."""


class ModelError(SpectralError):
    """A model that cannot be loaded or that Spectral does not support."""


class SessionError(SpectralError):
    """An archive or saved session that is damaged, or was made for another model, profile, setting or version."""


class RequestError(SpectralError):
    """One request is refused. `param` names the field at fault, `code` is stable and machine-readable."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_request") -> None:
        self.param = param
        self.code = code
        super().__init__(message)


class ContextLengthExceeded(RequestError):
    """The prompt does not fit the model's context."""

    def __init__(self, prompt_tokens: int, context_length: int, *, param: str | None = "messages") -> None:
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length
        super().__init__(
            f"the prompt has {prompt_tokens} tokens and this model's context is {context_length} tokens, "
            "of which at least one must be left for the answer; shorten the prompt",
            param=param,
            code="context_length_exceeded",
        )


class QueueFull(RequestError):
    """Too many requests are waiting for this model already."""

    def __init__(self, queued: int) -> None:
        super().__init__(f"{queued} requests are already waiting for this model; try again later", code="queue_full")


class DeadlineExceeded(RequestError):
    """The request's deadline passed before it finished."""

    def __init__(self, seconds: float) -> None:
        message = f"the request did not finish within {seconds:g} s; allow more in timeout_s, or ask for fewer tokens"
        super().__init__(message, param="timeout_s", code="deadline_exceeded")


class BrokenNumbers(RequestError):
    """The model's logits for this request are NaN or infinite: no token can be chosen."""

    def __init__(self) -> None:
        super().__init__(
            "the model computed numbers that are not finite (NaN or infinite) for this request, so no token can be "
            "chosen; where other requests fail so too, its weights are damaged or its dtype is too narrow for them: "
            "check its files, or set dtype: float32",
            code="numbers_not_finite",
        )
