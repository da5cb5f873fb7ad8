"""Which replica gets a request. Pure: no clock, no I/O.

Every replica that could take it is given the seconds that the request is likely to lose there, and the least wins:

    read      prompt tokens that its cache does not hold yet, at the speed of prefill
    wait      requests before it, beyond what runs at once
    pressure  a cache that is nearly full parks or squeezes somebody
    quality   the setting's measured KL, in seconds as the planner counts it
    wake      a replica that sleeps

What a cache holds is known by where prompts that began alike were sent: a prompt's blocks are hashed in a chain, so a
block stands for everything before it. The earlier turns of a chat are the beginning of the next prompt, so a chat stays
where it is unless that costs more than to read it again. Gateways that know nothing of each other agree on a new prompt
by rendezvous hashing of its first block.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import msgspec

from server.scheduler.options import KL_SECONDS

BLOCK_CHARS = 1024
"""Text of one block, about the 256 tokens that the engine's prefixes are made of."""
MAX_BLOCKS = 64
CHARS_PER_TOKEN = 4.0
BLOCK_TOKENS = BLOCK_CHARS / CHARS_PER_TOKEN
KNOWN_BLOCKS = 65_536
PREFILL_TOKENS_S = 2000.0
SERVICE_S = 4.0
"""How long a sequence is taken to run, for those that wait for its place."""
STEP_S = 0.002
"""What one more sequence in a batch costs all others of it, per token of an answer, summed over the answer."""
PRESSURE_FROM, PRESSURE_S = 0.8, 10.0
WAKE_S = 2.0
MIX, MASK = 0x9E3779B97F4A7C15, (1 << 64) - 1
AGREED = 0.5
"""How sure the replica that all gateways agree on is to have a prompt's first block."""


class Candidate(msgspec.Struct, frozen=True, gc=False):
    """A replica as a router sees it. `kv_share`: the part of its lease that is in use; `kl`: of its setting."""

    replica: str
    running: int = 0
    queued: int = 0
    concurrency: int = 8
    kv_share: float = 0.0
    kl: float = 0.0
    asleep: bool = False
    home: bool = False
    """It has the cache of the chat that the request belongs to."""


def blocks_of(texts: Iterable[str], salt: str = "") -> tuple[int, ...]:
    """Chain hashes of a prompt's whole blocks, and of what is left at its end where it has no whole block.

    `salt`: who shares prefixes; a prompt of another salt has other blocks.
    """
    found: list[int] = []
    link, rest = hashlib.blake2b(salt.encode("utf-8", "replace"), digest_size=8).digest(), ""
    for text in texts:
        rest += text + "\0"
        while len(rest) >= BLOCK_CHARS and len(found) < MAX_BLOCKS:
            link = _next(link, rest[:BLOCK_CHARS])
            found.append(int.from_bytes(link, "big"))
            rest = rest[BLOCK_CHARS:]
        if len(found) == MAX_BLOCKS:
            break
    if not found:
        found.append(int.from_bytes(_next(link, rest), "big"))
    return tuple(found)


def _next(link: bytes, text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8, key=link).digest()


def rendezvous(block: int, replicas: Iterable[str]) -> str:
    """The replica that everybody chooses for a block, whatever order they know them in."""
    best, most = "", -1
    for name in replicas:
        mixed = (((block ^ _number(name)) * MIX) & MASK) >> 16
        if mixed > most or (mixed == most and name > best):
            best, most = name, mixed
    return best


def shares(queues: Mapping[str, int], places: int) -> dict[str, int]:
    """How many of the requests that wait with each replica go to one that has just become hot and has so many free
    places: those, and then as many that all queues are as long."""
    fair = lambda level: sum(max(0, count - level) for count in queues.values()) <= places + level  # noqa: E731
    level = bisect_left(range(max(queues.values(), default=0)), True, key=fair)
    return {name: count - level for name, count in queues.items() if count > level}


@lru_cache(maxsize=65_536)
def _number(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


class Router:
    """Chooses, and remembers what it chose. One per gateway; what others chose it sees by the replicas' queues."""

    def __init__(self, known_blocks: int = KNOWN_BLOCKS) -> None:
        self._most = known_blocks
        self._where: OrderedDict[int, tuple[str, ...]] = OrderedDict()  # block -> replicas, the latest first

    def choose(self, blocks: Sequence[int], tokens: float, candidates: Sequence[Candidate]) -> Candidate:
        """The best of `candidates`, of which there must be one. `tokens`: the prompt's, as far as can be told."""
        if len(candidates) == 1:
            return candidates[0]
        known = self._known(blocks)
        agreed = "" if known or not blocks else rendezvous(blocks[0], [each.replica for each in candidates])
        unread = max(0.0, tokens) / PREFILL_TOKENS_S
        best, least = candidates[0], float("inf")
        for each in candidates:  # a fleet's busiest model has a hundred: no calls in here
            name, busy, places = each.replica, each.running + each.queued, each.concurrency
            lost = busy * STEP_S + each.kl * KL_SECONDS
            if busy >= places:
                lost += (busy + 1 - places) / places * SERVICE_S
            if each.kv_share > PRESSURE_FROM:
                lost += (each.kv_share - PRESSURE_FROM) * PRESSURE_S
            if each.asleep:
                lost += WAKE_S
            count = len(blocks) if each.home else known.get(name, AGREED if name == agreed else 0.0)
            if count:
                lost += max(0.0, tokens - count * BLOCK_TOKENS) / PREFILL_TOKENS_S
            else:
                lost += unread
            if lost < least or (lost == least and name < best.replica):
                best, least = each, lost
        return best

    def _known(self, blocks: Sequence[int]) -> dict[str, float]:
        """Replicas that were given a prompt's beginning before, and how many of its leading blocks."""
        found: dict[str, float] = {}
        have: Sequence[str] = ()
        for at, block in enumerate(blocks):
            there = self._where.get(block, ())
            have = there if not at else [name for name in have if name in there]
            if not have:
                break
            for name in have:
                found[name] = at + 1.0
        return found

    def known(self, blocks: Sequence[int], replica: str) -> int:
        """How many leading blocks of a prompt this replica was given before."""
        count = 0
        for block in blocks:
            if replica not in self._where.get(block, ()):
                break
            count += 1
        return count

    def sent(self, blocks: Sequence[int], replica: str) -> None:
        """Remember where a prompt went."""
        for block in blocks:
            others = tuple(name for name in self._where.pop(block, ()) if name != replica)
            self._where[block] = (replica, *others[:3])
        while len(self._where) > self._most:
            self._where.popitem(last=False)

    def lost(self, replicas: Iterable[str]) -> None:
        """These replicas and their caches are gone."""
        gone = set(replicas)
        for block, names in list(self._where.items()):
            if gone.intersection(names):
                left = tuple(name for name in names if name not in gone)
                if left:
                    self._where[block] = left
                else:
                    del self._where[block]
