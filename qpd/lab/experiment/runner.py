"""Runs an experiment: repetitions of all conditions on one fabric, raw data written as each trial ends."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from qpd.lab import wan
from qpd.lab.errors import LabError
from qpd.lab.experiment import drive, reckon, seeds, steered, tiers
from qpd.lab.experiment.model import Condition, ConstantRate, Experiment, FabricSection, Limit, Point
from qpd.lab.experiment.observation import Observation
from qpd.lab.experiment.raw import Trial, Writer
from qpd.lab.experiment.shelf import Shelf
from qpd.lab.fabric import DEFAULT_BFD, Fabric
from qpd.lab.faults import Schedule
from qpd.lab.topology import Link
from qpd.lab.workload import Workload

MENDABLE = (LabError, OSError, subprocess.SubprocessError, asyncio.TimeoutError)
"""What ends a trial and not the run."""

OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class Plan:
    """One trial before it runs."""

    number: int
    repetition: int
    point: Point
    condition: Condition

    @property
    def sweep(self) -> str:
        """The value of the swept key, as text; '' where nothing is swept."""
        return "" if self.point.value is None else str(self.point.value)

    def __str__(self) -> str:
        swept = f", {self.sweep}" if self.sweep else ""
        return f"repetition {self.repetition + 1}: {self.condition.name}{swept}"


def plans(experiment: Experiment) -> list[Plan]:
    """All trials in their order: repetition by repetition, within it the conditions by turns.

    The machine's unrest and warmth then fall on all conditions alike.
    """
    points = experiment.points()
    found: list[Plan] = []
    for repetition in range(experiment.repetitions):
        first = repetition % len(experiment.conditions)
        turned = [*experiment.conditions[first:], *experiment.conditions[:first]]
        found += [
            Plan(len(found) + index, repetition, point, condition)
            for index, (point, condition) in enumerate(
                (point, condition) for point in points for condition in turned
            )
        ]
    return found


@dataclass
class Ended:
    """What is told of each trial as it ends."""

    plan: Plan
    error: str
    """'' where it went well."""
    seconds: float
    measures: dict[str, float]


class Runner:
    """Runs the trials of an experiment on a fabric that is up and converged, without qpd."""

    def __init__(
        self,
        experiment: Experiment,
        fabric: Fabric,
        directory: Path,
        *,
        on_end: Callable[[Ended], None] = lambda _: None,
        rebuild: Callable[[], None] | None = None,
    ) -> None:
        """`rebuild` is called where a failed trial has left a fabric that does not come back by itself."""
        self.experiment = experiment
        self.fabric = fabric
        self._writer = Writer(directory)
        self._on_end = on_end
        self._rebuild = rebuild
        self._timers: dict[Link, tuple[int, int]] = {}
        self._limit: Limit | None = None
        self._shelf = Shelf()
        self._own_shapes = {link: fabric.shape(link.a) for link in fabric.topology.inter_site_links}

    def run(self) -> int:
        """All trials; returns how many failed."""
        self._check()
        failed = 0
        try:
            for plan in plans(self.experiment):
                failed += not self._one(plan)
        finally:
            self._shelf.close()
            self._shape(None)
            self.fabric.restore()
            self.fabric.reseed(self.fabric.state.seed)
        return failed

    def _check(self) -> None:
        """Raise LabError where the experiment does not fit the fabric."""
        names = set(self.fabric.hosts)
        for point in self.experiment.points():
            point.experiment.faults.check(self.fabric.topology)
            if point.experiment.fabric.wan.needs_netem and (problem := wan.missing()):
                raise LabError(f"fabric.wan: {problem}")
            workload = point.experiment.workload
            for host in {*workload.hosts, *_receivers(workload)}:
                if host not in names:
                    known = ", ".join(self.fabric.hosts)
                    raise LabError(f"workload: {self.fabric.name} has no host {host}; it has {known}")

    def _shape(self, wanted: FabricSection | None) -> None:
        """Limit uplinks and make wide-area links of those between sites; None: as the topology has them."""
        own = {link: self._own_shapes[link] for link in self.fabric.topology.inter_site_links}
        for link, shape in own.items():
            shape_now = wanted.wan if wanted is not None and wanted.wan != wan.PLAIN else shape
            if self.fabric.shape(link.a) != shape_now:
                self.fabric.set_shape(link, shape_now)
        limit = wanted.uplinks if wanted is not None else None
        if limit != self._limit:
            if limit is None:
                steered.unlimit(self.fabric)
            else:
                steered.limit(self.fabric, limit)
            self._limit = limit

    def _one(self, plan: Plan) -> bool:
        """Run a trial and write it down; False where it failed."""
        trial, begun, error = Trial(), time.monotonic(), ""
        measures: dict[str, float] = {}
        bounds: set[str] = set()
        try:
            measures, bounds = self._run(plan, trial)
        except MENDABLE as problem:
            # Half a trial's rows would be taken for a whole one's.
            trial, error = Trial(), " ".join(str(problem).split()) or type(problem).__name__
            self._mend()
        seconds = time.monotonic() - begun
        trial.add(
            "trials",
            condition=plan.condition.name,
            sweep=plan.sweep,
            repetition=plan.repetition,
            seed=self._seed(plan),
            status=FAILED if error else OK,
            error=error,
            seconds=seconds,
            at_least=" ".join(sorted(bounds)),
            **measures,
        )
        self._writer.add(plan.number, trial)
        self._on_end(Ended(plan, error, seconds, measures))
        return not error

    def _mend(self) -> None:
        try:
            self.fabric.restore()
            self._timers = {}
            self._shape(self.experiment.fabric)
            self.fabric.wait_converged(self.experiment.fabric.deadline)
        except MENDABLE:
            if self._rebuild is None:
                raise
            self._rebuild()
            self._limit = None
            self._shelf.close()

    def _seed(self, plan: Plan) -> int:
        return seeds.trial_seed(self.experiment.seed, plan.repetition)

    # -- one trial ----------------------------------------------------------------------------------------------

    def _run(self, plan: Plan, trial: Trial) -> tuple[dict[str, float], set[str]]:
        experiment, condition, seed = plan.point.experiment, plan.condition, self._seed(plan)
        fabric, topology = self.fabric, self.fabric.topology
        schedule = seeds.shifted(experiment.faults, seed, experiment.fault_jitter)
        self._shape(experiment.fabric)
        self._set_bfd(experiment, condition)
        workload = experiment.workload
        # Where packets are at a constant rate nothing goes back, and the receivers' leaves have nothing to choose.
        leaves = list(dict.fromkeys(topology.leaf_of(host) for host in workload.hosts))
        groups = tiers.groups(topology, workload.hosts)
        memory = None
        with steered.steered(fabric, condition, leaves, seed, self._shelf) as daemons:

            async def body() -> tuple[Observation, drive.Outcome]:
                observation = Observation(fabric, groups)
                async with observation:
                    driven = _drive(fabric, workload, condition, schedule, seed)
                    try:
                        outcome = await asyncio.wait_for(driven, experiment.deadline)
                    except asyncio.TimeoutError:
                        raise LabError(f"not ended after {experiment.deadline:.0f} s") from None
                return observation, outcome

            observation, outcome = asyncio.run(body())
            memory = steered.resident_bytes(fabric, daemons)
        if schedule.entries:
            fabric.wait_converged(experiment.fabric.deadline)
        measures, bounds = self._reckon(observation, outcome, trial)
        if memory is not None:
            measures["qpd_resident_bytes"] = memory
        return measures, bounds

    def _set_bfd(self, experiment: Experiment, condition: Condition) -> None:
        links = set(self.fabric.topology.fabric_links)
        if experiment.faults.entries:
            links &= {
                link
                for one in experiment.faults.entries
                for link in reckon.hurt_links(one.fault, self.fabric.topology)
            }
        timers = condition.bfd or experiment.fabric.bfd
        late = [link for link in sorted(links, key=str) if self._timers.get(link, DEFAULT_BFD) != timers]
        steered.set_bfd(self.fabric, late, timers)
        self._timers.update(dict.fromkeys(late, timers))

    def _reckon(
        self, observation: Observation, outcome: drive.Outcome, trial: Trial
    ) -> tuple[dict[str, float], set[str]]:
        topology = self.fabric.topology
        observation.write(trial)
        before = min((one.begin_ns for one in outcome.faults), default=None)
        hurt = reckon.hurt_qps(outcome.faults, observation.placement(before), topology)
        hurt |= {(qp.destination, qp.qp) for qp in outcome.qps if qp.back in hurt}
        measures = observation.factors() | reckon.totals(outcome)
        measures |= reckon.iterations(outcome.iterations, outcome.faults)
        silence, bounds = reckon.silences(outcome, hurt)
        left, more = reckon.left_after(
            outcome,
            observation.sightings,
            observation.link_by_index(),
            {int(IPv4Address(qp.destination)) for qp in outcome.qps},
            topology,
        )
        _write_qps(trial, observation, outcome, hurt)
        _write_faults(trial, observation, outcome, self.fabric)
        _write_iterations(trial, observation, outcome)
        return measures | silence | left, bounds | more


def _write_qps(
    trial: Trial, observation: Observation, outcome: drive.Outcome, hurt: set[tuple[str, int]]
) -> None:
    for qp in outcome.qps:
        received = qp.received_packets
        trial.add(
            "qps",
            source=qp.source,
            destination=qp.destination,
            qp=qp.qp,
            source_port=qp.source_port,
            sent_packets=qp.sent_packets,
            received_packets=received,
            lost_packets=None if received is None else qp.sent_packets - received,
            retransmitted_packets=qp.retransmitted_packets,
            timeouts=qp.timeouts,
            naks=qp.naks,
            silence_s=None if qp.silence_ns is None else qp.silence_ns / 1e9,
            silence_at_s=None if not qp.silence_at_ns else observation.seconds(qp.silence_at_ns),
            hurt=int((qp.destination, qp.qp) in hurt) if outcome.faults else None,
            error=qp.error,
        )


def _write_faults(trial: Trial, observation: Observation, outcome: drive.Outcome, fabric: Fabric) -> None:
    for one in outcome.faults:
        ends = sorted(str(end) for link in reckon.hurt_links(one.fault, fabric.topology) for end in link.ends)
        trial.add(
            "faults",
            fault=str(one.fault),
            links=" ".join(ends),
            planned_s=one.planned,
            begin_s=observation.seconds(one.begin_ns),
            end_s=None if one.end_ns is None else observation.seconds(one.end_ns),
        )


def _write_iterations(trial: Trial, observation: Observation, outcome: drive.Outcome) -> None:
    for row in outcome.iterations:
        trial.add(
            "iterations",
            begin_s=observation.seconds(row["begin_ns"]),
            end_s=observation.seconds(row["end_ns"]),
            **{
                key: row[key]
                for key in ("number", "seconds", "communication_s", "straggler", "lag_s", "wrong_values")
            },
        )


def _receivers(workload: ConstantRate | Workload) -> list[str]:
    return workload.receivers if isinstance(workload, ConstantRate) else []


def _drive(
    fabric: Fabric,
    workload: ConstantRate | Workload,
    condition: Condition,
    schedule: Schedule,
    seed: int,
) -> Coroutine[None, None, drive.Outcome]:
    if isinstance(workload, ConstantRate):
        return drive.constant_rate(fabric, workload, condition.steering, schedule, seed)
    return drive.collective(fabric, workload, condition.steering, schedule, seed)
