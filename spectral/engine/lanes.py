"""The stores of one engine: one lane for each setting in use, all within one budget of bytes.

A store holds one setting. Squeezing re-encodes a lane's store in place; its sequences go on at the coarser setting. A
finer setting cannot give back what a coarser one dropped: relaxing opens a new lane for sequences that begin from then
on, and the old lane ends with its last sequence. The same happens where a live sequence's `max_kl` forbids a squeeze.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from spectral.aside import aside
from spectral.code_dispatch import codes_for
from spectral.codec import EXACT, coarser
from spectral.dispatch import kernels_for
from spectral.engine.lane import Lane
from spectral.engine.prefix import PrefixCache, block_length
from spectral.engine.sequence import Sequence
from spectral.engine.types import EngineLimits
from spectral.errors import OutOfPages, ProfileError, RequestError
from spectral.pages import PageStore
from spectral.parking import park
from spectral.pools import squeeze_fill
from spectral.shelf import Shelf

if TYPE_CHECKING:
    from spectral.codec import Codebook
    from spectral.hf import LoadedModel
    from spectral.profile import SpectralProfile

log = logging.getLogger("spectral.engine")

FREE_PREFIX_BYTES = 1 << 30
"""Most bytes of reusable prefixes where the cache has no limit; with one, it is half of the limit."""


class Lanes:
    """All lanes of an engine.

    Args:
        loaded: the model; limits: EngineLimits; chunk: tokens of a prompt's chunks.
        codebook, setting: the first lane; profile: where other settings come from (None: there are no others).
    """

    def __init__(
        self,
        loaded: LoadedModel,
        limits: EngineLimits,
        chunk: int,
        *,
        codebook: Codebook | None,
        setting: str,
        profile: SpectralProfile | None = None,
    ) -> None:
        self._loaded, self._limits, self._profile, self._chunk = loaded, limits, profile, chunk
        self.all: list[Lane] = []
        self._books: dict[str, Codebook | None] = {}
        self.shelf = Shelf(loaded.device.type)
        self.current = self._make(setting, self._adopt(codebook))
        self.parked_nbytes = self.parks = self.squeezes = 0
        self._past_tokens = [0, 0]  # asked and reused, of lanes that have ended

    def _make(self, setting: str, codebook: Codebook | None) -> Lane:
        # The exact setting keeps what the model computes: its answers are those of an uncompressed cache.
        dtype = next(self._loaded.model.parameters()).dtype if codebook is None else torch.bfloat16
        limits = self._limits

        def elsewhere() -> int:
            mine = known()
            return self.nbytes - (mine.store.nbytes if mine is not None and mine in self.all else 0)

        store = PageStore(
            self._loaded.shape, codebook, device=self._loaded.device, max_bytes=limits.max_kv_bytes, window_dtype=dtype,
            devices=self._loaded.layer_devices, elsewhere=elsewhere,
        )  # fmt: skip
        most = limits.prefix_bytes
        if most is None:
            most = FREE_PREFIX_BYTES if limits.max_kv_bytes is None else limits.max_kv_bytes // 2
        prefix = PrefixCache(store, self._identity(setting, store.codebook), block_length(self._chunk), most)
        lane = Lane(setting, self._kl(setting), store, prefix)
        known = weakref.ref(lane)  # a lane that has ended goes at once, and its setting's tables with it
        self.all.append(lane)
        return lane

    def _adopt(self, book: Codebook | None) -> Codebook | None:
        """Have a setting's tables remembered where its name says which they are."""
        mine = self._profile.content_hash if self._profile is not None else ""
        if book is not None and mine and book.profile_hash == mine:
            self.shelf.adopt(book)
        return book

    def keep(self) -> Iterator[None]:
        """Copy the current setting's tables to host memory, so that it is quick to come back to them; see `Shelf`.
        Another thread may do this, and may stop at any time."""
        setting = self.current.setting
        self._adopt(None if setting == EXACT else self.current.store.codebook)
        return self.shelf.keep(setting)

    def _identity(self, setting: str, book: Codebook) -> bytes:
        return f"{self._loaded.fingerprint}|{book.profile_hash}|{setting}|{book.window_bits}|{self._chunk}".encode()

    def _kl(self, setting: str) -> float:
        if setting == EXACT:
            return 0.0
        if self._profile is None:  # a codebook by itself, whose quality nobody has measured
            return float("inf")
        return self._profile.row(setting).kl_mean

    def bytes_per_token(self, setting: str) -> Callable[[int], float]:
        """All-in bytes per token of one sequence at a setting, from its tokens; no lane is made for that."""
        for lane in self.all:
            if lane.setting == setting:
                return lane.store.bytes_per_token
        if setting == EXACT or self._profile is None:
            dtype = next(self._loaded.model.parameters()).dtype
            return PageStore(self._loaded.shape, window_dtype=dtype).bytes_per_token
        return self._profile.row(setting).bytes_per_token

    # -- which lane ------------------------------------------------------------------------------------------------

    def setting_for(self, max_kl: float | None, setting: str | None = None) -> str:
        """The setting that is asked for; else the current one, or where that is not good enough the coarsest that is,
        which is exact where no row of the ladder is. Raises RequestError for a setting that cannot be had."""
        if setting is not None:
            return self._asked(setting, max_kl)
        if max_kl is None or self.current.kl <= max_kl:
            return self.current.setting
        ladder = self._profile.ladder if self._profile is not None else []
        good = [row for row in ladder if row.kl_mean <= max_kl]
        if not good:
            return EXACT
        return min(good, key=lambda row: row.bytes_per_token(self._loaded.context_length)).name

    def _asked(self, setting: str, max_kl: float | None) -> str:
        ladder = [] if self._profile is None else [row.name for row in self._profile.ladder]
        known = list(dict.fromkeys([EXACT, *ladder, self.current.setting]))
        if setting not in known:
            message = f"setting {setting!r} is none of this model's: {', '.join(known)}"
            raise RequestError(message, param="setting", code="quality_unavailable")
        kl = self.current.kl if setting == self.current.setting else self._kl(setting)
        if max_kl is not None and kl > max_kl:
            message = f"setting {setting!r} is measured at a KL of {kl:.3g}, which is more than max_kl, "
            message += f"{max_kl:g}; leave setting out to get one that is close enough, or raise max_kl"
            raise RequestError(message, param="max_kl", code="quality_unavailable")
        return setting

    def join(self, sequence: Sequence) -> Lane:
        """The lane of a sequence that waits, chosen now unless it has one. Raises RequestError as `setting_for`."""
        if sequence.lane is None:
            sequence.lane = self.lane(self.setting_for(sequence.max_kl, sequence.setting))
            sequence.lane.members += 1
        lane: Lane = sequence.lane
        return lane

    def lane(self, setting: str) -> Lane:
        """The lane at a setting, made if there is none. Raises SettingError or ProfileError."""
        for lane in self.all:
            if lane.setting == setting:
                return lane
        return self._make(setting, self._codebook(setting))

    def _codebook(self, setting: str) -> Codebook | None:
        if setting in self._books:
            return self._books[setting]
        if setting == EXACT:
            return None
        if self._profile is None:
            raise ProfileError(f"setting {setting!r} needs a spectral profile, and this engine was made without one")
        if (known := self.shelf.find(setting)) is not None:
            return known
        return self._adopt(
            self._profile.codebook(setting, device=self._loaded.layer_devices, finer=self.current.store.codebook)
        )

    def prepare(self, setting: str) -> None:
        """Make what a setting needs, so that `set_setting` and the step after it are quick. Another thread may call it.

        Raises SettingError or ProfileError.
        """
        setting, now = self._resolve(setting), self.current.store.codebook
        began = time.perf_counter()
        held = [lane.store.codebook for lane in self.all]  # a lane may end meanwhile: see `aside`
        with aside(self._loaded.layer_devices):
            book = self._codebook(setting)
            if book is not None and coarser(now, book):
                squeeze_fill(now.layers, book.layers)
            for layer, codec in enumerate(book.layers if book is not None else ()):
                shape = self._loaded.shape
                group = shape.query_heads // shape.layers[layer].kv_heads
                dtype = next(self._loaded.model.parameters()).dtype
                kernels_for(codec, book.window, group, dtype)  # type: ignore[union-attr]
                codes_for(codec)
        held.clear()
        log.debug("setting %s prepared in %.3f s", setting, time.perf_counter() - began)
        self._books = {setting: book}

    def leave(self, sequence: Sequence) -> None:
        """A sequence ended or goes back to begin anew."""
        lane: Lane | None = sequence.lane
        self.forget_parked(sequence)
        if lane is not None:
            lane.prefix.leave(sequence)
            lane.members -= 1
            sequence.lane = None
            self.retire(lane)

    def retire(self, lane: Lane) -> None:
        """Forget a lane that has no sequences and is not the current one."""
        if lane is self.current or lane.members or lane not in self.all:
            return
        lane.prefix.clear()
        lane.store.trim()
        self.all.remove(lane)
        self._past_tokens[0] += lane.prefix.asked_tokens
        self._past_tokens[1] += lane.prefix.reused_tokens

    # -- parking ---------------------------------------------------------------------------------------------------

    def park(self, sequence: Sequence) -> None:
        """Move a running sequence's row to host memory; where there is no room, its tokens are computed again later."""
        lane: Lane = sequence.lane
        most, size = self._limits.max_host_bytes, lane.store.row_nbytes(sequence.row)
        if sequence.row.length and (most is None or self.parked_nbytes + size <= most):
            sequence.parked = park(lane.store, sequence.row)
            self.parked_nbytes += sequence.parked.nbytes
            self.parks += 1
        lane.close(sequence)

    def forget_parked(self, sequence: Sequence) -> None:
        """Drop what is in host memory."""
        if sequence.parked is not None:
            self.parked_nbytes -= sequence.parked.nbytes
            sequence.parked = None

    def open(self, sequence: Sequence) -> None:
        """Give a waiting sequence its row. Raises OutOfPages, nothing changed."""
        size = sequence.parked.nbytes if sequence.parked is not None else 0
        self.join(sequence).open(sequence)
        self.parked_nbytes -= size

    # -- bytes -----------------------------------------------------------------------------------------------------

    def stores(self) -> list[PageStore]:
        """The stores of all lanes."""
        return [lane.store for lane in self.all]

    @property
    def nbytes(self) -> int:
        """Bytes allocated on the device, by all lanes."""
        return sum(lane.store.nbytes for lane in self.all)

    @property
    def unused_nbytes(self) -> int:
        """Bytes allocated that nobody owns."""
        return sum(lane.store.nbytes - lane.store.held_nbytes for lane in self.all)

    def spare(self) -> int | None:
        """Bytes that nobody owns; None for no limit."""
        most = self._limits.max_kv_bytes
        return None if most is None else most - sum(lane.store.held_nbytes for lane in self.all)

    @property
    def idle_nbytes(self) -> int:
        """Bytes of prefixes that no sequence uses."""
        return sum(lane.prefix.idle_nbytes for lane in self.all)

    def free_idle(self, nbytes: int) -> int:
        """Forget idle prefixes until so many bytes are free, other lanes' first; the bytes that became so."""
        freed = 0
        for lane in sorted(self.all, key=lambda lane: lane is self.current):
            if freed < nbytes:
                freed += lane.prefix.free(nbytes - freed)
        return freed

    def make_room(self, error: OutOfPages) -> bool:
        """Find bytes without touching sequences: idle prefixes, then memory that is allocated and not used."""
        freed = self.free_idle(error.needed_bytes)
        return bool(freed) | bool(self.trim())

    def trim(self) -> int:
        """Give memory that nobody owns back to the device; the bytes."""
        return sum(lane.store.trim() for lane in self.all)

    @property
    def reuse(self) -> tuple[int, int]:
        """Prompt tokens asked for, and those taken over from a prefix, since the start."""
        asked, reused = self._past_tokens
        return (
            asked + sum(lane.prefix.asked_tokens for lane in self.all),
            reused + sum(lane.prefix.reused_tokens for lane in self.all),
        )

    # -- the setting -----------------------------------------------------------------------------------------------

    def set_setting(self, setting: str, live: Iterable[Sequence]) -> int:
        """Run at another setting from now on; see the module. Returns the bytes freed on the device.

        Raises SettingError for a name that is not on the ladder, ProfileError without a profile; nothing has changed.
        """
        setting = self._resolve(setting)
        before = self.nbytes
        if setting == self.current.setting:
            return 0
        book = self._codebook(setting)
        kl = self._kl(setting)
        floors: dict[Lane, float] = {}
        sequences = list(live)
        for sequence in sequences:
            if sequence.lane is not None and sequence.max_kl is not None:
                floors[sequence.lane] = min(sequence.max_kl, floors.get(sequence.lane, float("inf")))
        for lane in self.all:
            if book is None or not coarser(lane.store.codebook, book):
                continue
            if kl > floors.get(lane, float("inf")):
                log.info("setting %s stays for sequences whose max_kl forbids %s", lane.setting, setting)
                continue
            lane.prefix.clear()
            lane.store.squeeze(book)
            lane.setting, lane.kl, lane.prefix.identity = setting, kl, self._identity(setting, book)
            self.squeezes += 1
            for sequence in sequences:  # what they have computed saw the finer setting: not what others would compute
                sequence.resumed |= sequence.lane is lane
        old = self.current
        self.current = next((lane for lane in self.all if lane.setting == setting), None) or self._make(setting, book)
        for lane in [*self.all]:
            self.retire(lane)
        if old in self.all and old is not self.current:
            old.prefix.clear()
        self._books.pop(setting, None)  # the lanes have it; where another one comes, its tables are to go
        self.trim()
        return before - self.nbytes

    def _resolve(self, setting: str) -> str:
        if setting == EXACT or setting == self.current.setting:
            return setting
        if self._profile is None:
            raise ProfileError(f"setting {setting!r} needs a spectral profile, and this engine was made without one")
        return self._profile.resolve(setting)

    def check(self) -> None:
        """Assert what must hold between two steps, for every lane."""
        for lane in self.all:
            lane.store.check()
            assert lane.prefix.nbytes <= lane.prefix.max_bytes
        assert self._limits.max_kv_bytes is None or self.nbytes <= self._limits.max_kv_bytes, "over the budget"
