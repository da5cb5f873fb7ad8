"""Reading the text files that commands are given."""

from __future__ import annotations

from pathlib import Path

from spectral.errors import SpectralError


def read_texts(paths: list[Path] | None, option: str = "--text") -> list[str] | None:
    """The files' contents, one string each; None when no file was named. Raises SpectralError naming a bad file."""
    if not paths:
        return None
    texts = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpectralError(f"{option} {path} cannot be read as UTF-8 text: {error}") from error
        if not text.strip():
            raise SpectralError(f"{option} {path} is empty; name a file with some paragraphs of text.")
        texts.append(text)
    return texts
