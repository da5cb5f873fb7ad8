"""Where the links of a profile's settings lie, and which level of the cold tier a row is written at.

Links of setting 8x of the profile `mine.safetensors` are the file `mine.8x.links` beside it, made by `spectral profile
link`. Everything that was saved with them needs these very links again.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

from spectral.codec import EXACT
from spectral.errors import SessionError

if TYPE_CHECKING:
    from spectral.linked import Links
    from spectral.profile import SpectralProfile

log = logging.getLogger("spectral")


def links_path(profile: Path, setting: str) -> Path:
    """Where a setting's links lie, for a profile's file."""
    return profile.with_name(f"{profile.stem}.{re.sub(r'[^A-Za-z0-9._-]', '_', setting)}.links")


class LinkFiles:
    """The links beside a profile, read when they are first wanted; the last ones stay in memory.

    `profile` None, or one without a file: there are none.
    """

    def __init__(self, profile: SpectralProfile | None) -> None:
        self._profile = profile
        self._known: tuple[tuple[Path, int, int], Links] | None = None

    def of_level(self, level: str, setting: str) -> Links | None:
        """What a row at a setting is to be written with: None for the fast level.

        level: "fast"; "small", which raises SessionError where there are no links; or "auto": small where there are
        some, else fast. The exact setting has no codes and is always written fast.
        """
        if level == "fast" or setting == EXACT:
            return None
        if level == "small":
            return self.need(setting)
        path = self._path(setting)
        if path is None or not path.is_file():
            return None
        try:
            return self._read(path, setting)
        except (SessionError, OSError) as error:
            log.warning("what is saved at setting %s is larger than it need be: %s", setting, error)
            return None

    def need(self, setting: str, digest: str = "") -> Links:
        """A setting's links, those with this digest if one is given. Raises SessionError with the remedy."""
        path = self._path(setting)
        where = path or "beside a profile's file, and this engine's profile has none"
        fit = f"fit them with `spectral profile link MODEL --profile FILE --settings {setting}`"
        try:
            links = self._read(path, setting) if path is not None else None
        except FileNotFoundError:
            links = None
        except OSError as error:
            raise SessionError(f"the links {path} cannot be read: {error.strerror or error}") from error
        if not digest:
            if links is None:
                raise SessionError(f"level small needs the links of setting {setting!r} ({where}): {fit}")
            return links
        if links is None or links.digest != digest:
            found = "are not there" if links is None else f"are others ({links.digest[:12]})"
            raise SessionError(
                f"the session was saved at level small with the links {digest[:12]} of setting {setting!r}, and those "
                f"in {where} {found}; copy the file from where the session was saved"
            )
        return links

    def _path(self, setting: str) -> Path | None:
        file = self._profile.file if self._profile is not None else None
        return links_path(file, setting) if file is not None else None

    def _read(self, path: Path, setting: str) -> Links:
        """Raises SessionError for links of another profile or setting, OSError."""
        from spectral.link_fit import load_links

        facts = path.stat()
        stamp = path, facts.st_mtime_ns, facts.st_size
        if self._known is None or self._known[0] != stamp:
            self._known = None  # not two in memory
            try:
                self._known = stamp, load_links(path)
            except SessionError as error:
                raise SessionError(f"{path}: {error}; fit them again with `spectral profile link`") from None
        links = self._known[1]
        assert self._profile is not None
        if (links.profile_hash, links.setting) != (self._profile.content_hash, setting):
            raise SessionError(
                f"the links {path} are for setting {links.setting!r} of another profile, or of an earlier one of this "
                f"name: fit them again with `spectral profile link MODEL --profile FILE --settings {setting}`"
            )
        return links
