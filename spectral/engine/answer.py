"""The text side of one choice: tokens in, deltas out, and the reason when it ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from spectral.engine.detokenize import Detokenizer, StopFilter
from spectral.engine.types import Delta, FinishReason, Logprob


class Answer:
    """Collects the tokens of one choice.

    Args:
        decode: token ids to text; context: tokens before the answer (see Detokenizer).
        ends: token ids that end it; limit: most tokens; stops: strings that end it and are not part of it.
        logprobs: whether deltas carry log probabilities: those of the tokens that the answer's text is made of, so
            neither the token that ends it nor what lies wholly behind a stop string's beginning. `with_end`: the
            former all the same, as those who score a prompt count on it (lm-eval asks for one token and drops it).
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
        with_end: bool = False,
    ) -> None:
        self.count = 0
        self._detokenizer = Detokenizer(decode, context)
        self._filter = StopFilter(stops) if stops else None
        self._ends, self._limit, self._with_end = ends, limit, with_end
        self._text = ""
        self._told = ""  # what deltas have given out of an answer that a stop string may cut
        self._tokens: list[int] = []
        self._written = self._given = 0  # characters that tokens have made, and those that the stop filter let pass
        self._logprobs: deque[Logprob] | None = deque() if logprobs else None

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self._limit - self.count

    @property
    def cut(self) -> str | None:
        """The whole text, where a stop string has ended it; else None."""
        return self._told + self._text if self._filter is not None and self._filter.stopped else None

    def push(self, token: int, logprob: Logprob | None = None) -> FinishReason | None:
        """Add a token; the reason if the answer ends with it."""
        self.count += 1
        self._tokens.append(token)
        ended = token in self._ends
        full = self.count >= self._limit
        if self._logprobs is not None and logprob is not None and (self._with_end or not ended):
            self._logprobs.append(replace(logprob, offset=self._written))
        self._write("" if ended else self._detokenizer.push(token), last=ended or full)
        if ended or self.cut is not None:
            return "stop"
        return "length" if full else None

    def end(self) -> FinishReason:
        """The answer is whole without an end token: give out what was held back."""
        self._write("", last=True)
        return "stop"

    def _write(self, piece: str, *, last: bool) -> None:
        if last:
            piece += self._detokenizer.flush()
        self._written += len(piece)
        if self._filter is not None:
            piece = self._filter.push(piece)
            if last:
                piece += self._filter.flush()
        self._given += len(piece)
        self._text += piece

    def take(self, request_id: str, index: int, *, last: bool = False) -> Delta | None:
        """What has come since the last delta; None while there is no text yet, unless it is the last."""
        if not self._text and not (last and self._tokens):
            return None
        delta = Delta(request_id, index, self._text, tuple(self._tokens), self._shown(last))
        self._told += self._text if self._filter is not None else ""
        self._text, self._tokens = "", []
        return delta

    def _shown(self, last: bool) -> tuple[Logprob, ...] | None:
        """Log probabilities of tokens whose text is given out. Others wait: a stop string may still cut them off."""
        waiting = self._logprobs
        if waiting is None:
            return None
        whole = last and self.cut is None  # then tokens without text are the answer's as well
        shown = []
        while waiting and (whole or waiting[0].offset < self._given):
            shown.append(waiting.popleft())
        return tuple(shown)
