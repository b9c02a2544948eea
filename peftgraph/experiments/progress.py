"""Shows a training on stderr while it runs."""

from __future__ import annotations

from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from peftgraph.terminal.console import ERR


class ProgressCallback(TrainerCallback):
    """A bar with the loss and the last evaluation.

    Args:
        metric: of an evaluation, as the Trainer names it.
        title: of the metric.
    """

    def __init__(self, metric: str, title: str) -> None:
        self._metric = metric
        columns = (TextColumn("step {task.completed}/{task.total}"), BarColumn(), TextColumn("{task.fields[told]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=ERR, disable=not ERR.is_terminal)
        self._title, self._loss, self._value = title, "", ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        self._bar.start()
        self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, told="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self._show(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the loss and the last evaluation."""
        if "loss" in (logs or {}):
            self._loss = f"loss {float(logs['loss']):.3f}"
        if self._metric in (logs or {}):
            self._value = f"{self._title} {float(logs[self._metric]):.3f}"
        self._show(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the bar."""
        self._bar.stop()

    def _show(self, step: int) -> None:
        if hasattr(self, "_task"):
            self._bar.update(self._task, completed=step, told="  ".join(filter(None, (self._loss, self._value))))
