"""The training loop's progress in the terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from neat_kernels.finetune.measure import Measure


class TerminalProgress:
    """A bar for each method with loss, tokens per second and time left, and a line for each evaluation.

    Args:
        console: where to draw. The evaluations are printed as lines, so that a log file shows them too.
        measure: what they measure.
    """

    def __init__(self, console: Console, measure: Measure) -> None:
        self._measure = measure
        self._bars = Progress(
            TextColumn("[bold]{task.description:<6}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None
        self._method = ""

    def __enter__(self) -> TerminalProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def start(self, method: str, steps: int) -> None:
        """Add the bar of a method that begins."""
        self._method = method
        self._task = self._bars.add_task(method, total=steps, loss="–", speed="–")

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Move the bar."""
        assert self._task is not None, "start() comes first"
        self._bars.update(self._task, completed=step, loss=f"{loss:.3f}", speed=f"{tokens_per_second:,.0f}")

    def evaluated(self, step: int, loss: float, value: float) -> None:
        """Print a line with what the validation split was measured by."""
        told = f"validation {self._measure.name} {self._measure.told(value):>6}"
        self._bars.console.print(
            f"{self._method:<6} step {step:>5}  training loss {loss:6.3f}  {told}",
            highlight=False,
            soft_wrap=True,
        )
