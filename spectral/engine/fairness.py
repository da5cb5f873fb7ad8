"""Tenants that share an engine: whose turn it is, who gives a place away, who leaves out steps for others.

* Turns: the tenant that has been served the fewest tokens goes first. Who was away comes back level with the others,
  and is the next.
* Places: with all places taken, a tenant that has at least two fewer than another, and no more tokens, gets one of them
  at once; the sequence that holds the least is parked for it and goes on later. So nobody waits for another's answer to
  end, and no place is kept empty for somebody who may not come.
* Time: a tenant that asks for no more than an equal share of the places is light. What a step takes longer than one
  without those who burden the light ones is a debt, which steps without them pay YIELD times, the first one in advance.
  So others make the tokens of a light tenant slower than alone by at most 1 + 1 / YIELD, however many or long their
  requests are, and where they cost it nothing (a GPU's step of eight is hardly longer than of one) they leave out
  nothing. It is burdened, while they have had more tokens than it has, by tenants that ask for more than their share,
  and by prompts, of which a step has one.

Tenants count within a priority: a higher one does not wait for a lower one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable

from spectral.engine.sequence import Sequence

YIELD = 1.5
WEIGHT = 0.2
"""Of the newest step in the average of those without who burdens others."""
PROBE = 16
"""So many steps with them in succession: the next is without, to measure what such a one takes."""
FADES = 0.9
"""What every step leaves of what the longest one took longer."""


class Fairness:
    """What tenants were given. `places`: sequences that run at once. Belongs to the scheduler."""

    def __init__(self, places: int) -> None:
        self._places = places
        self.served: Counter[str] = Counter()
        """Tokens computed for each tenant that has sequences."""
        self._light: dict[str, int] = {}  # those that run, and the highest priority of theirs
        self._many: set[str] = set()  # those that ask for more than their share
        self._owed = 0.0
        self._longer = 0.0  # what a step with them takes longer
        self._alone = 0.0  # seconds of a step without those who burden others
        self._since = 0  # steps with them since that was measured
        self._prompt = False  # one that burdens others is in the step
        self._burdened = self._pays = self._decodes = False  # what the last step was

    def came(self, tenant: str, present: Collection[str]) -> None:
        """A tenant has a new sequence beside those that have some: no claim to what others had while it was away."""
        if tenant not in present:
            self.served = Counter({name: self.served[name] for name in present})
            self.served[tenant] = min(self.served.values(), default=1) - 1

    def took(self, seconds: float) -> None:
        """How long the step took that was put together last."""
        if self._burdened:
            self._since += 1
            longer = max(0.0, seconds - self._alone)
            self._owed += YIELD * longer if self._since < PROBE else self._alone
            self._longer = max(longer, FADES * self._longer)
        elif self._pays:
            self._owed = max(0.0, self._owed - seconds)
            if self._decodes:
                self._since = 0
                self._alone += WEIGHT * (seconds - self._alone) if self._alone else seconds

    def look(self, running: list[Sequence], waiting: list[Sequence]) -> None:
        """A step is put together from these."""
        wanted = Counter(s.tenant for s in running)
        wanted.update(s.tenant for s in waiting)
        share = max(1.0, self._places / max(1, len(wanted)))
        self._many = {tenant for tenant, count in wanted.items() if count > share}
        self._light.clear()
        if len(wanted) > 1:
            for s in running:
                if s.tenant not in self._many:
                    self._light[s.tenant] = max(s.priority, self._light.get(s.tenant, s.priority))
        if not self._light:
            self._owed = YIELD * self._longer
        self._prompt = False

    def light(self, sequence: Sequence) -> bool:
        """Whether its tenant is one of several and asks for no more than its share."""
        return len(self.served) > 1 and sequence.tenant not in self._many

    def burdens(self, sequence: Sequence) -> bool:
        """Whether a light tenant's step is longer for this one, which has had more."""
        if not self._light or (sequence.pending == 1 and sequence.tenant not in self._many):
            return False
        had = self.served[sequence.tenant]
        return any(self.served[name] < had and top >= sequence.priority for name, top in self._light.items())

    def leaves_out(self, sequence: Sequence) -> bool:
        """Whether this one is not in the step."""
        late = self._owed > 0 and self._owed >= self._alone
        return (late or (self._prompt and sequence.pending != 1)) and self.burdens(sequence)

    def takes(self, sequence: Sequence) -> None:
        """A prompt is in the step."""
        self._prompt = self._prompt or self.burdens(sequence)

    def spend(self, work: Iterable[tuple[Sequence, int]]) -> None:
        """The step that was put together."""
        work = list(work)
        self._burdened = any(self.burdens(s) for s, _ in work)
        self._pays = bool(self._light) and not self._burdened and not any(s.tenant in self._many for s, _ in work)
        self._decodes = all(s.pending == 1 for s, _ in work)
        for sequence, count in work:
            self.served[sequence.tenant] += count

    def gives_way(self, newcomer: Sequence, running: list[Sequence]) -> Sequence | None:
        """Whose place the newcomer gets, if all are taken."""
        held, had = Counter(s.tenant for s in running), self.served
        others = [
            s for s in running
            if s.priority <= newcomer.priority
            and held[s.tenant] >= held[newcomer.tenant] + 2
            and had[s.tenant] >= had[newcomer.tenant]
        ]  # fmt: skip
        key = lambda s: (held[s.tenant], -s.priority, -s.row.length, s.order)  # noqa: E731
        return max(others, key=key, default=None)
