"""From a model, a profile and a setting's name to an engine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spectral.engine.engine import Engine
from spectral.engine.types import EngineLimits
from spectral.errors import ProfileError
from spectral.profile import LadderRow, SpectralProfile
from spectral.resources import cache_home, profile_path

if TYPE_CHECKING:
    from spectral.hf import LoadedModel


@dataclass(frozen=True)
class Built:
    """An engine and where its setting comes from; `profile` and `row` are None for a model without a profile, and
    `row` for the exact setting."""

    engine: Engine
    profile: SpectralProfile | None
    row: LadderRow | None

    def rank(self, row: LadderRow) -> float:
        """Latent channels that a setting keeps, averaged over the compressed layers."""
        layers = self.profile.layers if self.profile is not None else []
        return row.rank / max(1, sum(layer is not None for layer in layers))


def saved_profile_path(loaded: LoadedModel) -> Path:
    """Where a profile made on this machine is kept: under $SPECTRAL_PROFILES, else the user's cache folder."""
    home = os.environ.get("SPECTRAL_PROFILES") or cache_home() / "profiles"
    name = re.sub(r"[^A-Za-z0-9._-]", "_", loaded.name.rstrip("/").rsplit("/", 1)[-1])
    return Path(home) / f"{name}-{loaded.fingerprint[:12]}.safetensors"


def find_profile(loaded: LoadedModel, given: str | os.PathLike[str] | None = None) -> SpectralProfile | None:
    """The profile given, or the one shipped for the model, or one saved on this machine; None if there is none.

    Raises ProfileError for a file that is damaged or (if given) made for another model.
    """
    if given is not None:
        profile = SpectralProfile.load(given)
        profile.check_model(loaded)
        return profile
    shipped, saved = profile_path(loaded.name), saved_profile_path(loaded)
    for path in (shipped, saved):
        if path is not None and path.is_file():
            profile = SpectralProfile.load(path)
            if profile.fingerprint == loaded.fingerprint:  # a model of the same name may be another one
                return profile
    return None


def build_engine(
    loaded: LoadedModel, profile: SpectralProfile | None, *, setting: str = "auto", limits: EngineLimits | None = None
) -> Built:
    """An engine at a setting: "exact", a row of the profile's ladder, or "auto" (the profile's default row).

    Raises ProfileError if the setting needs a profile and there is none, SettingError if the ladder lacks it.
    """
    if setting == "exact":
        return Built(Engine(loaded, limits=limits, profile=profile), profile, None)
    if profile is None:
        raise ProfileError(
            f"setting {setting!r} needs a spectral profile and {loaded.name!r} has none; "
            f"build one with `spectral profile build {loaded.name} --output FILE`, or set setting to exact"
        )
    row = profile.row(setting)
    codebook = profile.codebook(row.name, device=loaded.layer_devices)
    return Built(
        Engine(loaded, codebook=codebook, setting=row.name, limits=limits, profile=profile), profile, row
    )
