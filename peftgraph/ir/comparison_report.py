"""The report of comparing a program with the model that it was traced from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ComparisonReport:
    """Lists the runs on which a program and its model gave the same outputs, and what was not compared.

    Attributes:
        runs: the calls on which both gave the same, such as "evaluation at input_ids 3x7".
        values: whether values were compared; without weights (the meta device) sizes and dtypes are.
        skipped: what was not compared, with the reason.
    """

    runs: tuple[str, ...] = ()
    values: bool = True
    skipped: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the report in one line."""
        what = "equal to the model" if self.values else "of the model's sizes"
        count = f"{what} in {len(self.runs)} run{'' if len(self.runs) == 1 else 's'}"
        return count if not self.skipped else f"{count}, {len(self.skipped)} not compared"

    def __str__(self) -> str:
        if not self.runs and not self.skipped:
            return "not compared with the model"
        what = "equal to the model" if self.values else "of the model's sizes"
        lines = [f"{what}: {run}" for run in self.runs] + [f"not compared: {reason}" for reason in self.skipped]
        return "\n".join(lines)
