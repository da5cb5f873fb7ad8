"""Tokens to text, piece by piece: whole characters only, and nothing from a stop string on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from spectral import thought_forms, tool_forms

REPLACEMENT = "\ufffd"
_MARKS = (*tool_forms.MARKS, *thought_forms.MARKS)
MAX_PENDING = 64
"""Tokens that may stay undecided; a text that is not UTF-8 for longer than this is passed on as it is."""


def make_decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """A function from token ids to text; the tokenizer's fast path where it has one. Of the special tokens only the
    marks of tool calls and thoughts are shown: without them nobody could tell where a call begins, or an answer."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
    decode = tokenizer.decode if backend is None or cleans else backend.decode
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {ident: str(token.content) for ident, token in added.items() if token.special}
    marks = {ident for ident, text in special.items() if text in _MARKS}
    hidden = special.keys() - marks

    def without_special(ids: list[int]) -> str:
        return str(decode(ids, skip_special_tokens=True))

    def with_marks(ids: list[int]) -> str:
        if marks.isdisjoint(ids):
            return without_special(ids)
        return str(decode([i for i in ids if i not in hidden], skip_special_tokens=False))

    return with_marks if marks else without_special


class Detokenizer:
    """Incremental decoding of one answer: the pieces joined equal the decoding of all tokens at once.

    Only the tokens since the last whole character, and those of the step before (some tokenizers treat the first
    token of a text differently), are decoded again.
    """

    def __init__(self, decode: Callable[[list[int]], str], context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._ids: list[int] = list(context)  # tokens before the undecided ones
        self._settled = len(self._ids)
        # Characters of the window that were given out; a character that the context left unfinished was not.
        self._seen = len(decode(self._ids).rstrip(REPLACEMENT)) if self._ids else 0

    def push(self, token: int) -> str:
        """Text that this token completes; empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = not text.endswith(REPLACEMENT) or len(self._ids) - self._settled > MAX_PENDING
        end = len(text) if whole else len(text.rstrip(REPLACEMENT))  # byte fallback shows one mark for each byte
        piece = text[self._seen : end]
        self._seen = max(self._seen, end)
        if whole:
            if len(text) > 0:
                del self._ids[: self._settled]
                self._seen = len(self._decode(self._ids))
            self._settled = len(self._ids)
        return piece

    def flush(self) -> str:
        """What is left at the end: the replacement character of an unfinished one."""
        text = self._decode(self._ids) if self._ids else ""
        piece = text[self._seen :]
        self._seen = len(text)
        return piece


class StopFilter:
    """Holds back text that may be the beginning of a stop string, and ends at the first whole one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is safe to give out. Sets `stopped` when a stop string is complete."""
        if not self._stops or self.stopped:
            return "" if self.stopped else text
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """The held text, when the answer ends for another reason."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins of byte-level BPE vocabularies."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(b): b for b in plain}
    others = (b for b in range(256) if b not in set(plain))
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes that a token stands for, which may be part of a character."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(piece, str):
        return b""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes([int(piece[3:5], 16)])
    text = str(tokenizer.decode([token]))
    if REPLACEMENT in text:
        alphabet = _byte_alphabet()
        if all(c in alphabet for c in piece):
            return bytes(alphabet[c] for c in piece)
    return text.encode("utf-8", errors="replace")


def longest_token(tokenizer: Any) -> int:
    """Characters of the longest token: a text of n characters has at least n / that many tokens. At least 1."""
    vocabulary = tokenizer.get_vocab() if hasattr(tokenizer, "get_vocab") else {}
    return max((len(piece) for piece in vocabulary), default=1) or 1
