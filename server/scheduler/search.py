"""The deterministic search for a plan: greedy starts, then moves that repair what they displace. Pure.

An assignment is one option per model. A move gives one model another option; where a device is then over its budget,
other models there step down, least cost per byte freed first, until it fits; then whoever can step up again does. The
move stays if the sum of costs fell. All options are looked at together, as arrays: flat option k belongs to model
`owner[k]`, costs `cost[k]` and takes `size[k, d]` bytes of device d. Effort is counted in looks, not in seconds: the
same input gives the same plan on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from server.scheduler.demand import HOT, Choice

EPSILON = 1e-9


class Search:
    """Options of all models. `table[m]`: model m's options; `budgets`: bytes by device."""

    def __init__(self, table: Sequence[Sequence[Choice]], budgets: dict[str, int]) -> None:
        number = {name: at for at, name in enumerate(budgets)}
        self.models = len(table)
        self.options = [option for row in table for option in row]
        self.owner: np.ndarray = np.repeat(np.arange(self.models), [len(row) for row in table])
        self.first = np.concatenate(([0], np.cumsum([len(row) for row in table])))
        self.cost = np.array([option.cost for option in self.options], dtype=np.float64)
        self.size: np.ndarray = np.zeros((len(self.options), len(budgets)), dtype=np.int64)
        for k, option in enumerate(self.options):
            for name, size in option.shares:
                self.size[k, number[name]] = size
        self.budgets = np.array(list(budgets.values()), dtype=np.int64)
        self._every = [np.arange(int(a), int(b)) for a, b in zip(self.first, self.first[1:], strict=False)]
        self._looks = 0

    def total(self, chosen: np.ndarray) -> float:
        """The sum of costs of an assignment: chosen[m] is the flat option of model m."""
        return float(self.cost[chosen].sum())

    def fits(self, chosen: np.ndarray) -> bool:
        """Whether every device is within its budget."""
        return bool((self.size[chosen].sum(0) <= self.budgets).all())

    def least(self) -> np.ndarray:
        """Every model at the option that takes the fewest bytes."""
        sums = self.size.sum(1)
        return np.array([self.first[m] + int(np.argmin(sums[self.row(m)])) for m in range(self.models)], dtype=int)

    def cheapest(self) -> np.ndarray:
        """Every model at what is best for it, whether all fit or not."""
        return np.array([self.first[m] + int(np.argmin(self.cost[self.row(m)])) for m in range(self.models)], dtype=int)

    def row(self, m: int) -> slice:
        """A model's options."""
        return slice(int(self.first[m]), int(self.first[m + 1]))

    def starts(self) -> list[np.ndarray]:
        """Greedy starts: by worth per byte, by worth, largest first; each model settles where there is room."""
        every = range(self.models)
        sums, hot = self.size.sum(1), np.array([option.residency == HOT for option in self.options], dtype=bool)
        rows = [self.row(m) for m in every]
        least = [max(1, int(min(sums[row][hot[row]], default=1))) for row in rows]
        worth = [float(self.cost[row].max() - self.cost[row].min()) for row in rows]
        orders = [
            sorted(every, key=lambda m: (-worth[m] / least[m], m)),
            sorted(every, key=lambda m: (-worth[m], m)),
            sorted(every, key=lambda m: (-least[m], m)),
        ]
        return [self.fill(self.least(), order) for order in orders]

    def fill(self, chosen: np.ndarray, order: Sequence[int]) -> np.ndarray:
        """Each model of `order` in turn takes its cheapest option that fits beside the others."""
        chosen = chosen.copy()
        used = self.size[chosen].sum(0)
        for m in order:
            row = self.row(m)
            rest = used - self.size[chosen[m]]
            fits = (self.size[row] + rest <= self.budgets).all(1)
            cost = np.where(fits, self.cost[row], np.inf)
            at = row.start + int(np.argmin(cost))
            if self.cost[at] < self.cost[chosen[m]] - EPSILON and fits[at - row.start]:
                chosen[m] = at
            used = rest + self.size[chosen[m]]
        return chosen

    def exhaust(self, chosen: np.ndarray, nodes: int) -> tuple[np.ndarray, bool]:
        """The best assignment, and True; or the best that so many steps of a depth-first search found, and False.

        Every model's options are tried cheapest first, and no further than the models behind it could still pay for.
        """
        number = [m for m in range(self.models) if self.first[m] < self.first[m + 1]]
        rows = [sorted(range(int(self.first[m]), int(self.first[m + 1])), key=lambda k: self.cost[k]) for m in number]
        costs, sizes, budgets = self.cost.tolist(), self.size.tolist(), self.budgets.tolist()
        rest = [0.0] * (len(rows) + 1)
        for at in range(len(rows) - 1, -1, -1):
            rest[at] = rest[at + 1] + costs[rows[at][0]]
        best, found, picked, left = self.total(chosen), chosen.tolist(), [0] * len(rows), nodes

        def visit(at: int, cost: float, used: list[int]) -> None:
            nonlocal best, found, left
            if at == len(rows):
                best, found = cost, [*picked]
                return
            for k in rows[at]:
                left -= 1
                if left < 0 or cost + costs[k] + rest[at + 1] >= best - EPSILON:
                    return
                taken = [a + b for a, b in zip(used, sizes[k], strict=True)]
                if all(a <= b for a, b in zip(taken, budgets, strict=True)):
                    picked[at] = k
                    visit(at + 1, cost + costs[k], taken)

        visit(0, 0.0, [0] * len(budgets))
        return np.array(found, dtype=int), left >= 0

    def improve(self, chosen: np.ndarray, looks: int, price: np.ndarray | None = None) -> np.ndarray:
        """Moves until none pays or the effort is spent. `price`: what a byte of each device is worth (a relaxed
        problem's dual), which says what to try first."""
        self._looks = looks
        worth = self.cost if price is None else self.cost + self.size @ price
        chosen = chosen.copy()
        self._step_up(chosen, self.size[chosen].sum(0))
        moved = True
        while moved and self._looks > 0:
            moved = False
            gain = self.cost[chosen][self.owner] - self.cost
            promise = worth[chosen][self.owner] - worth
            tried = np.flatnonzero(gain > EPSILON)
            used = self.size[chosen].sum(0)
            for k in tried[np.argsort(-promise[tried], kind="stable")]:
                if self._looks <= 0:
                    break
                found = self._repair(chosen, used, int(k))
                if found is not None:
                    chosen, moved = found, True
                    break
        return chosen

    def _step_up(self, chosen: np.ndarray, used: np.ndarray) -> None:
        """In place: the cheapest move of a single model that fits, again and again."""
        while True:
            self._looks -= 1
            saved = self.cost[chosen][self.owner] - self.cost
            better = np.flatnonzero(saved > EPSILON)  # few: only their bytes are looked at
            change = self.size[better] - self.size[chosen[self.owner[better]]]
            better = better[(change <= self.budgets - used).all(1)]
            if not better.size:
                return
            k = int(better[np.argmax(saved[better])])
            used += self.size[k] - self.size[chosen[self.owner[k]]]
            chosen[self.owner[k]] = k

    def _repair(self, chosen: np.ndarray, used: np.ndarray, k: int) -> np.ndarray | None:
        """The assignment with option k and what that displaces, if its cost is lower; else None. `used`: bytes of each
        device that `chosen` takes."""
        fixed = int(self.owner[k])
        gain = float(self.cost[chosen[fixed]] - self.cost[k])
        trial = chosen.copy()
        used = used + (self.size[k] - self.size[chosen[fixed]])
        trial[fixed] = k
        while (over := used > self.budgets).any():
            step = self._relief(trial, used, int(np.argmax(over)), fixed, gain)
            if step is None:
                return None
            other = int(self.owner[step])
            gain -= float(self.cost[step] - self.cost[trial[other]])
            used += self.size[step] - self.size[trial[other]]
            trial[other] = step
        self._step_up(trial, used)
        return trial if self.total(trial) < self.total(chosen) - EPSILON else None

    def _relief(self, trial: np.ndarray, used: np.ndarray, device: int, fixed: int, most: float) -> int | None:
        """The option that takes bytes from a device at the least cost per byte that is needed there; None where all
        that is too many there cannot be freed for less than `most`, as far as can be seen now."""
        self._looks -= 1
        # Few models lie on one device, and only their options are looked at.
        there = [self._every[m] for m in np.flatnonzero(self.size[trial, device]) if m != fixed]
        if not there:
            return None
        k = np.concatenate(there)
        now = trial[self.owner[k]]
        extra, freed = self.cost[k] - self.cost[now], self.size[now, device] - self.size[k, device]
        good = np.flatnonzero((freed > 0) & (extra < most - EPSILON))
        change = self.size[k[good]] - self.size[now[good]]
        change[:, device] = 0
        good = good[(change <= np.maximum(self.budgets - used, 0)).all(1)]
        excess = int(used[device] - self.budgets[device])
        extra, freed = extra[good], freed[good]
        if least_extra(extra, freed, excess) >= most - EPSILON:
            return None
        return int(k[good[np.argmin(extra / np.minimum(freed, excess))]])


def least_extra(extra: np.ndarray, freed: np.ndarray, excess: int) -> float:
    """A bound from below on what it costs to free so many bytes: the cheapest bytes of all options first, in parts and
    as if a model could take several. extra: float64 [n]; freed: int64 [n], all above 0."""
    price = np.maximum(extra, 0.0) / freed
    order = np.argsort(price)
    reach = np.cumsum(freed[order])
    last = int(np.searchsorted(reach, excess))
    if last == len(reach):
        return math.inf
    before = int(reach[last - 1]) if last else 0
    whole = np.maximum(extra, 0.0)[order[:last]].sum()
    return float(whole + price[order[last]] * (excess - before))
