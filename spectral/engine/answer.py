"""The text side of one choice: tokens in, deltas out, and the reason when it ends."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from spectral.engine.detokenize import Detokenizer, StopFilter
from spectral.engine.types import Delta, FinishReason, Logprob


class Answer:
    """Collects the tokens of one choice.

    Args:
        decode: token ids to text; context: tokens before the answer (see Detokenizer).
        ends: token ids that end it; limit: most tokens; stops: strings that end it and are not part of it.
        logprobs: whether deltas carry log probabilities.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        *,
        context: Sequence[int] = (),
        ends: Collection[int] = (),
        limit: int,
        stops: Sequence[str] = (),
        logprobs: bool = False,
    ) -> None:
        self.count = 0
        self._detokenizer = Detokenizer(decode, context)
        self._filter = StopFilter(stops) if stops else None
        self._ends, self._limit = ends, limit
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[Logprob] | None = [] if logprobs else None

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self._limit - self.count

    def push(self, token: int, logprob: Logprob | None = None) -> FinishReason | None:
        """Add a token; the reason if the answer ends with it."""
        self.count += 1
        self._tokens.append(token)
        if self._logprobs is not None and logprob is not None:
            self._logprobs.append(logprob)
        ended = token in self._ends
        full = self.count >= self._limit
        piece = "" if ended else self._detokenizer.push(token)
        if ended or full:
            piece += self._detokenizer.flush()
        if self._filter is None:
            self._text += piece
        else:
            self._text += self._filter.push(piece)
            if self._filter.stopped:
                return "stop"
            if ended or full:
                self._text += self._filter.flush()
        if ended:
            return "stop"
        return "length" if full else None

    def end(self) -> FinishReason:
        """The answer is whole without an end token: give out what was held back."""
        piece = self._detokenizer.flush()
        self._text += piece if self._filter is None else self._filter.push(piece) + self._filter.flush()
        return "stop"

    def take(self, request_id: str, index: int, *, last: bool = False) -> Delta | None:
        """What has come since the last delta; None while there is no text yet, unless it is the last."""
        if not self._text and not (last and self._tokens):
            return None
        logprobs = None if self._logprobs is None else tuple(self._logprobs)
        delta = Delta(request_id, index, self._text, tuple(self._tokens), logprobs)
        self._text, self._tokens = "", []
        if self._logprobs is not None:
            self._logprobs = []
        return delta
