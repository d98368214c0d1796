"""Try in place what the isolated measurements left open.

A layer's time alone does not tell what it does to its neighbours: a convolution that leaves its output in another
order may slow down the pooling behind it.  So wherever another method or order came close, the whole engine is run with
that step exchanged, in turns with the engine as it is, and the faster one stays.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from zeroskip.core.jsonable import to_json
from zeroskip.core.method import AnyMethod
from zeroskip.measure.bound import Bound
from zeroskip.plan.plan import Plan, Step
from zeroskip.plan.planner import Progress, Tuning, silent, step_of
from zeroskip.plan.tune import Option
from zeroskip.run.engine import Variant, executor
from zeroskip.run.executor import Executor
from zeroskip.run.timing import compare

CLOSE = 1.6
"""An alternative within this factor of the chosen option is worth a try."""
GAIN = 0.985
"""A change stays if the whole engine takes less than this share of its time."""
ROUNDS = 7
SECONDS = 5.0


def refine(
    tuning: Tuning,
    plans: Sequence[Plan],
    options: Mapping[str, Sequence[Option]],
    inputs: Sequence[Tensor],
    methods: Mapping[str, AnyMethod],
    known: dict[str, Bound],
    progress: Progress = silent,
    captured: bool = True,
) -> Plan:
    """The fastest of ``plans``, with every exchange that made its engine faster; stops after ``SECONDS``.

    Args:
        options: by starting node, what may be exchanged; those of ``tuning`` or a part of them.
        captured: whether a graph can hold the engines' calls; see ``compare``.
    """

    def times(engines: Sequence[Executor]) -> list[float]:
        staged = tuning.device.kind == "cuda"
        calls = {str(index): run.on(run.staged(inputs) if staged else inputs) for index, run in enumerate(engines)}
        measured = compare(calls, ROUNDS, tuning.device, captured).times
        return [measured[name].median_us for name in calls]

    deadline = time.perf_counter() + SECONDS
    engines = [executor(Variant(tuning.program, plan), methods, known) for plan in plans]
    taken = times(engines) if len(plans) > 1 and SECONDS > 0 else [0.0]
    fastest = taken.index(min(taken))
    plan, current = plans[fastest], engines[fastest]
    trials = _trials(options, plan)
    for done, (step, option) in enumerate(trials):
        if time.perf_counter() > deadline:
            break
        progress(done, len(trials), f"in place: {step.name} by {option.method}")
        changed = replace(step_of(tuning, option), why=f"faster in place than {step.method}, which was faster alone")
        trial_plan = replace(plan, steps=tuple(changed if old.nodes == step.nodes else old for old in plan.steps))
        trial = executor(Variant(tuning.program, trial_plan), methods, known)
        as_it_is, exchanged = times([current, trial])
        if exchanged < GAIN * as_it_is:
            plan, current = trial_plan, trial
    return plan


def _trials(options: Mapping[str, Sequence[Option]], plan: Plan) -> list[tuple[Step, Option]]:
    """The closest alternative of every other method or order, for each step; those that could gain most first."""
    found: list[tuple[float, Step, Option]] = []
    for step in plan.steps:
        known = options[step.nodes[0]]
        chosen = next(
            option
            for option in known
            if option.method == step.method and to_json(option.candidate.config) == step.config
        )
        seen = {(step.method, _order(chosen))}
        for option in known:
            kind = (option.method, _order(option))
            if option.segment.nodes != step.nodes or kind in seen or step.time_us is None:
                continue
            seen.add(kind)
            if option.time_us < CLOSE * step.time_us:
                found.append((math.sqrt(step.time_us) * step.time_us / option.time_us, step, option))
    found.sort(key=lambda trial: -trial[0])
    return [(step, option) for _, step, option in found]


def _order(option: Option) -> str:
    return option.candidate.outputs[0].order
