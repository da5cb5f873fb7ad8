"""Wrong keys from one address: a few cost nothing, many have to wait.

A key that was seen to be right from an address passes while others from there wait: behind a proxy all clients have one
address, and whoever guesses does not know that key. What is remembered is bounded.
"""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable

log = logging.getLogger("spectral.auth")
FREE, PER_MINUTE = 60, 30
"""Wrong keys that an address may send at once, and in each minute from then on."""
REMEMBERED = 10_000


class Throttle:
    """Counts by address. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failed: OrderedDict[str, tuple[float, float]] = OrderedDict()  # failures, as of when
        self._right: OrderedDict[tuple[str, str], None] = OrderedDict()

    def wait(self, client: str, key_hash: str) -> int:
        """Seconds that a caller has to wait before a key is looked at; 0: it may come in."""
        where = network(client)
        if where not in self._failed or (where, key_hash) in self._right:
            return 0
        over = self._level(where) - (FREE - 1)
        return max(0, math.ceil(over * 60 / PER_MINUTE))

    def failed(self, client: str) -> None:
        """A wrong key came."""
        where = network(client)
        level = self._level(where) + 1
        if level > FREE - 1 and self._failed.get(where, (0.0, 0.0))[0] <= FREE - 1:
            log.warning("%s sent %d keys that are not known; it has to wait now", client, FREE)
        self._failed[where] = (level, self._clock())
        self._failed.move_to_end(where)
        while len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)

    def passed(self, client: str, key_hash: str) -> None:
        """A right key came."""
        pair = (network(client), key_hash)
        self._right[pair] = None
        self._right.move_to_end(pair)
        while len(self._right) > REMEMBERED:
            self._right.popitem(last=False)

    def _level(self, where: str) -> float:
        level, at = self._failed.get(where, (0.0, 0.0))
        return max(0.0, level - (self._clock() - at) * PER_MINUTE / 60)


def network(client: str) -> str:
    """What counts as one place: an IPv4 address, or an IPv6 network of 64 bits, of which everybody has one."""
    try:
        address = ipaddress.ip_address(client.partition("%")[0])
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped is not None else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
