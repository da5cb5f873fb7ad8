"""Profile files: a small valid one whose document and tensors are changed and sealed again, and bytes of it.

An attacker can make any checksum, so the structure-aware target recomputes it: what is tested is what lies behind it.
"""

from __future__ import annotations

import json
from functools import cached_property
from random import Random
from typing import Any

import numpy as np

from spectral.errors import ProfileError, SettingError
from spectral.profile import SpectralProfile
from spectral.profile_file import digest
from tests.fuzz.mutate import mutate_bytes, mutate_document
from tests.fuzz.targets.base import Base

WORDS = (
    "model", "ladder", "layers", "default", "sliding", "provenance", "page_tokens", "window", "sinks", "kl_mean",
    "sides", "both", "key", "value", "transform", "none",
)  # fmt: skip
DTYPES = ("float32", "float16", "float64", "int64", "uint8", "bool")


class _Base(Base):
    seconds = 2.0

    @cached_property
    def files(self) -> list[bytes]:
        """Valid profiles, of pages that are transformed and of others: two layers with compression around one that
        slides; keys and values in own units."""
        return [self._file(prefer) for prefer in ("balanced", "speed")]

    def _file(self, prefer: str) -> bytes:
        import torch

        from spectral.from_tensors import profile_from_tensors

        torch.manual_seed(0)
        pair = torch.randn(2, 2, 64, 8) * torch.linspace(1, 0.1, 8)
        profile = profile_from_tensors(
            [pair, None, pair],
            sliding=[None, 24, None],
            ratios=(2.0, 4.0),
            prefer=prefer,
            sinks=2,
            recent=16,
            page_tokens=8,
        )
        return profile.save(self.folder / "valid").read_bytes()

    @cached_property
    def parts(self) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        """Their documents and tensors."""
        from safetensors.numpy import load

        found = []
        for file in self.files:
            length = int.from_bytes(file[:8], "little")
            sealed = json.loads(json.loads(file[8 : 8 + length])["__metadata__"]["spectral"])
            found.append((json.loads(sealed["document"]), load(file)))
        return found

    def check(self, item: bytes) -> str:
        """Read it, and do with it what the server does."""
        path = self.folder / "input.safetensors"
        path.write_bytes(item)
        try:
            profile = SpectralProfile.load(path)
        except ProfileError as error:
            assert len(str(error)) < 5000, "the reason repeats too much of the file"
            return "refused"
        use(profile)
        return "accepted"


def use(profile: SpectralProfile) -> None:
    """What is done with every profile that was read: facts as JSON, a summary, codecs for each setting."""
    facts = profile.to_dict()
    text = json.dumps(facts, allow_nan=False)
    assert json.loads(text)["content_hash"] == profile.content_hash
    text.encode()
    profile.summary().encode()
    assert isinstance(profile.model, str) and isinstance(profile.fingerprint, str)
    for row in profile.ladder:
        assert isinstance(row.name, str)
        profile.bits_map(row.name)
        profile.codebook(row.name)
    for bits in (1, 4, 16):
        profile.choose(bits=bits)
    try:
        profile.resolve("no such setting")
    except SettingError:
        return
    raise AssertionError("a setting that is not there was found")


class Structured(_Base):
    """The document or the tensors changed, the checksum right."""

    name = "profile"

    def make(self, random: Random) -> bytes:
        """A file."""
        document, tensors = random.choice(self.parts)
        tensors = dict(tensors)
        if random.random() < 0.7:
            document = mutate_document(document, random, WORDS)
        if random.random() < 0.5:
            for _ in range(random.choice((1, 1, 2))):
                _change_tensors(tensors, random)
        text = json.dumps(document)
        sealed: Any = {"document": text, "sha256": digest(text, tensors)}
        if random.random() < 0.03:
            sealed = mutate_document(sealed, random)
        return seal(tensors, json.dumps(sealed))


class Bytes(_Base):
    """The file's bytes changed: the header's length, its JSON, offsets, and the data behind."""

    name = "profile_bytes"

    def make(self, random: Random) -> bytes:
        """A file."""
        file = random.choice(self.files)
        if random.random() < 0.5:
            return mutate_bytes(file, random)
        length = int.from_bytes(file[:8], "little")
        header = json.loads(file[8 : 8 + length])
        text = json.dumps(mutate_document(header, random), default=str).encode("utf-8", "surrogatepass")
        if random.random() < 0.2:
            text = mutate_bytes(text, random)
        return len(text).to_bytes(8, "little") + text + file[8 + length :]


def _change_tensors(tensors: dict[str, np.ndarray], random: Random) -> None:
    name = random.choice(list(tensors))
    tensor = tensors[name].copy()
    kind = random.randrange(8)
    if kind == 0:
        del tensors[name]
        return
    if kind == 1:
        tensors[random.choice(("0.0.mean", "9.9.x", "table.1.step", "setting.99.0.0", ""))] = tensor
        return
    if kind == 2:
        tensor = tensor.astype(random.choice(DTYPES))
    elif kind == 3 and tensor.size:
        shape = random.choice(((0,), (1, tensor.size), (tensor.size,), (tensor.size, 1), (1,) * 40))
        tensor = np.resize(tensor, shape)
    elif kind == 4 and tensor.size and tensor.dtype.kind == "f":
        tensor.reshape(-1)[random.randrange(tensor.size)] = random.choice((np.nan, np.inf, -1.0, 0.0, 6e4, 1e-7))
    elif kind == 5 and tensor.size:
        tensor.reshape(-1)[random.randrange(tensor.size)] = random.randrange(10)
    elif kind == 6:
        tensor[...] = random.choice((0, 1, 3))
    else:
        tensor = tensors[random.choice(list(tensors))]
    tensors[name] = tensor


def seal(tensors: dict[str, np.ndarray], sealed: str) -> bytes:
    """A safetensors file with this metadata."""
    from safetensors.numpy import save

    return save({k: np.ascontiguousarray(v) for k, v in tensors.items()}, metadata={"spectral": sealed})


TARGETS = {"profile": Structured, "profile_bytes": Bytes}
