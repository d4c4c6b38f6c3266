"""From bytes and operations to a predicted time: the roofline of a device, and a gap for every launch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from neat_kernels.model.devices import Device
from neat_kernels.model.work import Step, Work


class Prediction(NamedTuple):
    """The time of one launch, predicted and not measured.

    Fields:
        work: the launch.
        memory: seconds that its bytes take.
        compute: seconds that its operations take.
        gap: seconds of the launch itself.
    """

    work: Work
    memory: float
    compute: float
    gap: float

    @property
    def seconds(self) -> float:
        """The slower of bytes and operations, and the gap."""
        return max(self.memory, self.compute) + self.gap

    @property
    def bound(self) -> str:
        """What takes the largest part of the time: memory, compute or launch."""
        parts = {"memory": self.memory, "compute": self.compute, "launch": self.gap}
        return max(parts, key=lambda name: parts[name])


class Total(NamedTuple):
    """The sum of several launches."""

    seconds: float
    bytes: int
    flops: int
    launches: int


def predict(work: Work, device: Device) -> Prediction:
    """The time of one launch on a device."""
    memory = (work.bytes_read + work.bytes_written) / device.bandwidth
    compute = work.flops / (device.throughput(work.unit) * work.efficiency)
    return Prediction(work, memory, compute, device.gap)


def total(works: Iterable[Work], device: Device) -> Total:
    """The sum over launches that follow one another."""
    predicted = [predict(work, device) for work in works]
    return Total(
        sum(p.seconds for p in predicted),
        sum(p.work.bytes_read + p.work.bytes_written for p in predicted),
        sum(p.work.flops for p in predicted),
        len(predicted),
    )


class Comparison(NamedTuple):
    """A way to run a layer beside the frozen linear, predicted."""

    step: Step
    forward: Total
    whole: Total
    ratio: float


def compare_steps(steps: Iterable[Step], floor: Step, device: Device) -> list[Comparison]:
    """Every step with its time as a ratio to the floor's, of which a step without backward meets the forward alone."""
    rows = []
    for step in steps:
        base = total(floor.launches if step.backward else floor.forward, device)
        whole = total(step.launches, device)
        rows.append(Comparison(step, total(step.forward, device), whole, whole.seconds / base.seconds))
    return rows
