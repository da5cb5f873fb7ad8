"""HiGHS through SciPy: the exact answer to a small plan, and the relaxed one (models in parts) to a large one.

SciPy takes 0.4 s (0.9 on a machine that is busy with streams) and 60 MB once: it is imported on a thread as soon as two
models are hot, so that the first plan that needs it, which is one for which memory got short, has it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from server.scheduler.search import Search

GAP = 1e-3
WHOLE = 1 - 1e-6


def import_solver() -> None:
    """Import what a plan may need. Any thread may."""
    import scipy.optimize
    import scipy.sparse  # noqa: F401


class Program:
    """A search's problem for HiGHS: one option for each model, at least cost, within every device's budget."""

    def __init__(self, search: Search) -> None:
        from scipy.sparse import csr_matrix

        self._search = search
        # One option of each model is chosen, so only differences count: a penalty shared by all its options would
        # drown the rest in the solver's tolerances.
        self._costs = search.cost - np.minimum.reduceat(search.cost, search.first[:-1])[search.owner]
        count = len(search.cost)
        option, device = np.nonzero(search.size)
        self._scale = 1.0 / np.maximum(1, search.budgets)
        self._bytes = csr_matrix(
            (search.size[option, device] * self._scale[device], (device, option)), shape=(len(search.budgets), count)
        )
        self._one = csr_matrix((np.ones(count), (search.owner, np.arange(count))), shape=(search.models, count))

    def exact(self, time_limit_s: float) -> tuple[np.ndarray | None, bool]:
        """The assignment, and whether it is proved best within GAP; None where none was found in time."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        result: Any = milp(
            self._costs,
            constraints=[LinearConstraint(self._one, 1.0, 1.0), LinearConstraint(self._bytes, 0.0, 1.0)],
            integrality=np.ones(len(self._costs)),
            bounds=Bounds(0, 1),
            options={"time_limit": time_limit_s, "mip_rel_gap": GAP},
        )
        if result.x is None:
            return None, False
        return self._largest(result.x)[0], result.status == 0

    def relaxed(self, time_limit_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """The option that has most of each model, how much of it, and each device's price in cost per byte."""
        from scipy.optimize import linprog

        result: Any = linprog(
            self._costs,
            A_ub=self._bytes,
            b_ub=np.ones(self._bytes.shape[0]),
            A_eq=self._one,
            b_eq=np.ones(self._one.shape[0]),
            bounds=(0, 1),
            method="highs-ds",
            options={"time_limit": time_limit_s, "presolve": False},  # it takes longer than it saves
        )
        if result.x is None or result.status != 0:
            return None
        return *self._largest(result.x), -result.ineqlin.marginals * self._scale

    def _largest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        search = self._search
        chosen = [int(search.first[m] + np.argmax(x[search.row(m)])) for m in range(search.models)]
        return np.array(chosen, dtype=int), x[chosen]
