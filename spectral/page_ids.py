"""Which pages of a pool are free, and how many owners each of the others has."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping


class PageIds:
    """Ids 0 .. capacity - 1. A page is free, or has one or more owners (rows and holds of spectral.pages)."""

    def __init__(self) -> None:
        self._owners: list[int] = []
        self._taken: list[int] = []
        self._free: list[int] = []
        self._foreseen: dict[int, list[int]] = {}

    @property
    def capacity(self) -> int:
        """All ids."""
        return len(self._owners)

    @property
    def free(self) -> int:
        """Ids without an owner."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Ids with owners, each counted once."""
        return self.capacity - self.free

    def take(self, count: int) -> list[int]:
        """Free ids, now with one owner each; there must be enough."""
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._own(page)
        return taken

    def _own(self, page: int) -> None:
        self._owners[page] = 1
        self._taken[page] += 1

    def times_taken(self, pages: Iterable[int]) -> list[int]:
        """How often each of them stopped being free: who knows it, and finds it as it was, knows that nobody else had
        the page meanwhile."""
        return [self._taken[page] for page in pages]

    def foresee(self, needs: Mapping[int, int]) -> dict[int, list[int]] | None:
        """Free ids that `grant` will give to keys with these needs, if nobody has taken them by then; None where there
        are too few. They stay free."""
        count = sum(needs.values())
        if count > self.free:
            return None
        ids = iter(self._free[: -count - 1 : -1])
        self._foreseen = {key: [next(ids) for _ in range(need)] for key, need in needs.items()}
        return dict(self._foreseen)

    def grant(self, needs: Mapping[int, int]) -> dict[int, list[int]]:
        """Free ids for every key, those foreseen for it where they are free; there must be enough."""
        hoped = {key: self._foreseen.pop(key, []) for key in needs}
        found = {key: hoped[key] for key, need in needs.items() if need == len(hoped[key]) and self._claim(hoped[key])}
        return {key: found[key] if key in found else self.take(need) for key, need in needs.items()}

    def _claim(self, ids: Collection[int]) -> bool:
        """Take these if all of them are free; whether they were."""
        if any(page >= self.capacity or self._owners[page] for page in ids):
            return False
        for page in ids:
            at = len(self._free) - 1
            while self._free[at] != page:  # what was next to be taken is near the end
                at -= 1
            del self._free[at]
            self._own(page)
        return True

    def share(self, pages: Iterable[int]) -> None:
        """One more owner for pages that have one."""
        for page in pages:
            assert self._owners[page] > 0, "a free page cannot be shared"
            self._owners[page] += 1

    def release(self, pages: list[int]) -> None:
        """One owner less; the first of those that become free is the first to be taken again."""
        for page in reversed(pages):
            self._owners[page] -= 1
            assert self._owners[page] >= 0, "a free page cannot be released"
            if self._owners[page] == 0:
                self._free.append(page)

    def owners(self, page: int) -> int:
        """How many own a page; 0 for a free one."""
        return self._owners[page]

    def grow(self, capacity: int) -> None:
        """More ids, free."""
        self._free[:0] = range(capacity - 1, self.capacity - 1, -1)
        new = [0] * (capacity - self.capacity)
        self._owners += new
        self._taken += new

    def compact(self) -> list[int]:
        """Forget all free ids and number the others anew. Returns the old id of each new one, in ascending order."""
        kept = [page for page, owners in enumerate(self._owners) if owners]
        self._owners = [self._owners[page] for page in kept]
        self._taken = [self._taken[page] for page in kept]
        self._free = []
        return kept

    def check(self, owned: Iterable[int]) -> None:
        """Assert that the owners' lists, joined, give these counts, and that free pages are free once."""
        counts = [0] * self.capacity
        for page in owned:
            counts[page] += 1
        assert counts == self._owners, "a page's owners are not those that are counted"
        assert sorted(self._free) == [page for page, count in enumerate(counts) if not count], "a page is lost"
