"""InferenceEngine: a model with a spectral cache in three lines, on top of spectral.engine.

with InferenceEngine("demo-7m") as engine:
    print(engine.chat([{"role": "user", "content": "What is the capital of France?"}]))
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from spectral.errors import ModelError, RequestError

if TYPE_CHECKING:
    from spectral.engine.build import Built
    from spectral.engine.engine import Engine
    from spectral.engine.types import Event, GenerateRequest
    from spectral.profile import SpectralProfile

log = logging.getLogger("spectral")

QUANTIZATION = {None: "none", "none": "none", "4bit": "nf4", "nf4": "nf4", "8bit": "int8", "int8": "int8"}
CALIBRATION_TOKENS = 16_384


class InferenceEngine:
    """Loads a model and answers prompts through a compressed KV cache. For one thread.

    Args:
        model_name: folder or hub name, or "demo-7m" for the embedded model.
        quantize: weights: None, "4bit" (nf4) or "8bit" (int8); both need the gpu extra.
        bits: bits per element that the cache should take; the ladder's closest setting is used (16: exact).
        profile: a SpectralProfile or its file; None: the one shipped or saved for the model, else a new one is made.
        setting: a ladder row's name, "exact" or "auto"; anything but "auto" is used instead of `bits`.
        device: as for spectral.hf.load_model.
        dtype: as for spectral.hf.load_model.
        context_length: shorter than the model's own, if given.
    """

    def __init__(
        self,
        model_name: str,
        quantize: str | None = None,
        bits: float | None = None,
        profile: SpectralProfile | str | Path | None = None,
        setting: str = "auto",
        *,
        device: str = "auto",
        dtype: str = "auto",
        context_length: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if quantize not in QUANTIZATION:
            raise ModelError(f"quantize must be None, '4bit' or '8bit', got {quantize!r}")
        if bits is not None and not 0 < bits <= 16:
            raise ModelError(f"bits must be above 0 and at most 16, got {bits!r}")
        self.model_name, self.quantize, self.bits, self.setting = model_name, quantize, bits, setting
        self._given_profile = profile
        self._device, self._dtype, self._context_length = device, dtype, context_length
        self._trust_remote_code = trust_remote_code
        self._built: Built | None = None
        self._numbers = itertools.count(1)
        self._mail: dict[str, deque[Event]] = {}  # events of the streams in use

    # -- life -----------------------------------------------------------------------------------------------------

    def load(self) -> InferenceEngine:
        """Load the model and its profile; without a profile, calibrate one and save it for the next time.

        Loading twice does nothing. Raises ModelError, ProfileError or SettingError.
        """
        if self._built is not None:
            return self
        from spectral.engine.build import build_engine
        from spectral.engine.types import EngineLimits
        from spectral.hf import load_model

        loaded = load_model(
            self.model_name,
            quantization=QUANTIZATION[self.quantize],
            dtype=self._dtype,
            device=self._device,
            trust_remote_code=self._trust_remote_code,
        )
        profile = None if self.setting == "exact" or self.bits == 16 else self._profile(loaded)
        limits = EngineLimits(context_length=self._context_length)
        self._built = build_engine(loaded, profile, setting=self._setting(profile), limits=limits)
        log.info("%s is loaded at setting %s", self.model_name, self._built.engine.setting)
        return self

    def unload(self) -> None:
        """Let go of the model and its cache. Unloading twice does nothing; load() brings it back."""
        self._built = None
        self._mail = {}
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> InferenceEngine:
        return self.load()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unload()

    def _profile(self, loaded: Any) -> SpectralProfile:
        from spectral.calibrate import SpectralProfiler
        from spectral.engine.build import find_profile, saved_profile_path
        from spectral.profile import SpectralProfile

        given = self._given_profile
        if isinstance(given, SpectralProfile):
            given.check_model(loaded)
            return given
        profile = find_profile(loaded, given)
        if profile is None:
            log.warning("no profile for %s: calibrating one, which takes a while", self.model_name)
            profile = SpectralProfiler().profile_from_loaded(loaded, tokens=CALIBRATION_TOKENS)
            path = profile.save(saved_profile_path(loaded))
            log.warning("the profile was saved as %s and will be used from now on", path)
        return profile

    def _setting(self, profile: SpectralProfile | None) -> str:
        return "exact" if profile is None else profile.choose(self.setting, self.bits)

    @property
    def _ready(self) -> Built:
        if self._built is None:
            raise ModelError("the model is not loaded; call load() first, or use the engine in a with statement")
        return self._built

    @property
    def profile(self) -> SpectralProfile | None:
        """The profile in use; None at the exact setting."""
        return self._ready.profile

    @property
    def active_setting(self) -> str:
        """The setting in use, "exact" or a ladder row's name."""
        return self._ready.engine.setting

    @property
    def kv_bytes(self) -> int:
        """Bytes that the cache's open sequences hold; 0 when nothing is being generated."""
        return self._ready.engine.store.used_nbytes

    # -- answers --------------------------------------------------------------------------------------------------

    def generate(self, prompt: str, max_tokens: int = 256, *, session: str | None = None, **sampling: Any) -> str:
        """The continuation of a text. `sampling`: any field of spectral.engine.types.SamplingParams.

        session: a name under which the cache is kept when the answer has ended; a prompt that goes on from there and
        gives the same name is computed from there on.
        """
        return "".join(self.stream(prompt, max_tokens=max_tokens, session=session, **sampling))

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        max_tokens: int = 256,
        *,
        session: str | None = None,
        **sampling: Any,
    ) -> str:
        """The answer to a conversation: [{"role": "user", "content": "..."}, ...]. `session`: see `generate`."""
        return "".join(self.stream(messages, max_tokens=max_tokens, session=session, **sampling))

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, str]],
        max_tokens: int = 256,
        *,
        session: str | None = None,
        **sampling: Any,
    ) -> TextStream:
        """The same, piece by piece. Closing the stream early ends the generation and frees its cache.

        Raises RequestError for a prompt or a parameter that cannot be used, before the first piece.
        """
        engine = self._ready.engine
        request = self._request(prompt, max_tokens, session, sampling)
        engine.submit(request)
        return TextStream(engine, request.request_id, self._mail)

    def _request(self, prompt: Any, max_tokens: int, session: str | None, sampling: dict[str, Any]) -> GenerateRequest:
        from spectral.engine.types import GenerateRequest, Message, SamplingParams

        if isinstance(sampling.get("stop"), str):
            sampling["stop"] = (sampling["stop"],)
        if sampling.get("n", 1) != 1:
            raise RequestError("n must be 1 here; call again for another answer", param="n")
        if "best_of" in sampling:
            raise RequestError("best_of is not offered: ask several times and choose", param="best_of")
        if not isinstance(prompt, str):
            try:
                prompt = [Message(str(m["role"]), str(m["content"])) for m in prompt]
            except (KeyError, TypeError) as error:
                raise RequestError("each message needs a role and a content", param="messages") from error
        known = [field.name for field in dataclasses.fields(SamplingParams)]
        unknown = next((name for name in sampling if name not in known), None)
        if unknown is not None:
            raise RequestError(f"unknown sampling parameter {unknown!r}; there are {', '.join(known)}", param=unknown)
        params = SamplingParams(max_tokens=max_tokens, **sampling)
        return GenerateRequest(f"call-{next(self._numbers)}", prompt, params, session=session)

    # -- sessions -------------------------------------------------------------------------------------------------

    def save_session(self, session: str, path: str | Path, *, cold_level: str = "auto") -> Path:
        """Write the cache kept under a name to a file, to go on from it after a restart. Returns the path.

        cold_level: "fast"; "small", a smaller file at a twentieth of the speed, which needs links beside the profile
        (`spectral profile link`), now and to go on; "auto": small where there are links, else fast.
        Raises SessionError for an unknown name or missing links, RequestError for another level and for what is no
        name, OSError.
        """
        return self._ready.engine.save_session(session, path, cold_level=cold_level)

    def resume_session(self, session: str, path: str | Path) -> int:
        """Read such a file: the next prompt with this session name goes on from it. Returns its tokens.

        Raises SessionError for a file that is damaged, of another model, profile or setting, or saved with links that
        are not beside the profile; RequestError for a name that is not 1 to 256 characters; OSError. Nothing has
        changed then.
        """
        return self._ready.engine.resume_session(session, path)


class TextStream(Iterator[str]):
    """The pieces of one answer. Several may be in use at once on one engine; each step serves them all.

    close(), or letting go of it, ends the generation and frees its cache.
    """

    def __init__(self, engine: Engine, request_id: str, mail: dict[str, deque[Event]]) -> None:
        self._engine, self._request_id, self._mail = engine, request_id, mail
        mail[request_id] = deque()

    def __next__(self) -> str:
        from spectral.engine.types import Delta, Failed, Finished

        while (box := self._mail.get(self._request_id)) is not None:
            while box:
                event = box.popleft()
                if isinstance(event, Delta) and event.text:
                    return event.text
                if isinstance(event, (Failed, Finished)):
                    self.close()
                if isinstance(event, Failed):
                    raise event.error
            if self._request_id in self._mail:
                for event in self._engine.step():
                    if event.request_id in self._mail:
                        self._mail[event.request_id].append(event)
        raise StopIteration

    def close(self) -> None:
        """End the generation. Closing twice does nothing."""
        if self._mail.pop(self._request_id, None) is not None:
            self._engine.cancel(self._request_id)

    def __del__(self) -> None:
        self.close()
