"""How the schedules of one kernel are searched: no point twice, the default first, then what lies next to the best."""

from __future__ import annotations

import random
from collections.abc import Mapping
from itertools import product
from threading import Event
from typing import Any

import tvm
from tvm.ir.utils import derived_object
from tvm.s_tir.meta_schedule.arg_info import ArgInfo
from tvm.s_tir.meta_schedule.search_strategy import MeasureCandidate, PySearchStrategy

from tvm_sparse.schedules import fast_parse  # noqa: F401  before MetaSchedule, which parses TVMScript when imported
from tvm_sparse.schedules.space import workload
from tvm_sparse.schedules.spec import KernelSpec
from tvm_sparse.schedules.table import defaults, space

Point = tuple[int, ...]
"""One schedule of a kernel: the value of each decision, in the order of its space."""


class Points:
    """The points of a kernel's space that are still to be tried, and what those tried took.

    The spaces here hold tens or hundreds of points, of which a few dozen run: a list is enough, and a model of what
    has not run would know less than the point beside it.
    """

    def __init__(self, spec: KernelSpec, seed: int = 0):
        self._decisions = space(spec)
        self._left = list(product(*(decision.choices for decision in self._decisions)))
        random.Random(seed).shuffle(self._left)
        self._seconds: dict[Point, float] = {}
        default = tuple(defaults(spec).values())
        self._left.sort(key=lambda point: point != default)  # first of all

    @property
    def size(self) -> int:
        return len(self._left) + len(self._seconds)

    def learn(self, decisions: Mapping[str, int], seconds: float) -> None:
        """Takes note of a trial, of this run or an earlier one; infinite where it failed."""
        point = tuple(decisions[decision.name] for decision in self._decisions)
        self._seconds[point] = seconds
        if point in self._left:
            self._left.remove(point)

    def take(self, count: int) -> list[Point]:
        """The next points: at random until some have run, then those in the fewest decisions apart from the best."""
        if self._seconds:
            best = min(self._seconds, key=lambda point: self._seconds[point])
            self._left.sort(key=lambda point: sum(a != b for a, b in zip(point, best, strict=True)))
        taken, self._left = self._left[:count], self._left[count:]
        return taken


@derived_object
class SearchPoints(PySearchStrategy):
    """MetaSchedule's side of `Points`: every point a replay of the design space's trace, with its own decisions."""

    def __init__(self, spec: KernelSpec, points: Points, trials: int, stop: Event) -> None:
        super().__init__()
        self.spec, self.points, self.left, self.stop = spec, points, trials, stop

    def _initialize_with_tune_context(self, context: Any) -> None:
        pass

    def pre_tuning(
        self, max_trials: int, num_trials_per_iter: int, design_spaces: list, database: Any = None,
        cost_model: Any = None,
    ) -> None:  # fmt: skip
        self.trace, self.at_once = design_spaces[0].trace, num_trials_per_iter

    def post_tuning(self) -> None:
        pass

    def generate_measure_candidates(self) -> list[MeasureCandidate] | None:
        if self.stop.is_set():
            return None
        taken = self.points.take(min(self.at_once, self.left))
        self.left -= len(taken)
        return [self._candidate(point) for point in taken] or None

    def notify_runner_results(self, measure_candidates: list, results: list) -> None:
        pass  # `Points.learn` is told where the record is written

    def clone(self) -> SearchPoints:
        return SearchPoints(self.spec, self.points, self.left, self.stop)

    def _candidate(self, point: Point) -> MeasureCandidate:
        trace = self.trace
        samples = [step for step in trace.insts if step.kind.name == "SampleCategorical"]
        for sample, value, decision in zip(samples, point, space(self.spec), strict=True):
            trace = trace.with_decision(sample, decision.choices.index(value), remove_postproc=False)
        schedule = tvm.s_tir.Schedule(workload(self.spec))
        trace.apply_to_schedule(schedule, remove_postproc=False)
        return MeasureCandidate(schedule, ArgInfo.from_entry_func(schedule.mod))
