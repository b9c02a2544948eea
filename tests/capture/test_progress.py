"""Progress: phases in order, every layer once, and nothing left behind in the model."""

from __future__ import annotations

import contextlib
import io
import sys
import time

import pytest
import torch
from torch import Tensor, nn

import peftgraph as pg
from peftgraph.capture import progress
from peftgraph.terminal.console import working
from peftgraph.utils import terminal_line
from peftgraph.utils.terminal_line import CLEAR_REST


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.inner = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])

    def forward(self, x: Tensor) -> Tensor:
        for norm in self.inner:
            x = norm(x)
        return x + self.down(torch.relu(self.up(x)))


class Tower(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def steps_of(model: nn.Module) -> list[tuple[str, int, int]]:
    steps: list[tuple[str, int, int]] = []
    pg.trace(model, (torch.randn(2, 5, 4),), progress=lambda *step: steps.append(step))
    return steps


def test_the_phases_come_in_order_and_the_outermost_layers_are_counted() -> None:
    steps = steps_of(Tower(3))
    assert list(dict.fromkeys(phase for phase, _, _ in steps)) == [
        "comparing training with evaluation",
        "exporting",
        "normalising",
        "comparing the program with the model",
        "finding sites",
        "verifying",
    ]
    # a block's own list of two norms is part of the block
    assert [step[1:] for step in steps if step[0] == "exporting"] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_one_layer_is_no_repetition_but_may_hold_one() -> None:
    assert [step[1:] for step in steps_of(Tower(1)) if step[0] == "exporting"] == [(0, 2), (1, 2), (2, 2)]


def test_places_that_are_left_empty_are_no_layers() -> None:
    class Sparse(Tower):
        def __init__(self) -> None:
            super().__init__(2)
            self.between = nn.ModuleList([None, nn.Linear(4, 4), None])  # pyright: ignore[reportArgumentType]

        def forward(self, x: Tensor) -> Tensor:
            return self.between[1](super().forward(x))

    assert [step[1:] for step in steps_of(Sparse()) if step[0] == "exporting"] == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_without_repetition_the_total_is_unknown() -> None:
    assert [step[1:] for step in steps_of(nn.Linear(4, 4)) if step[0] == "exporting"] == [(0, 0)]


def test_the_model_keeps_no_hook() -> None:
    model = Tower(2)
    steps_of(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_the_layer_even_while_tracing_silences_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with working("tracing") as progress, contextlib.redirect_stderr(io.StringIO()):
        progress("exporting", 3, 96)
    assert "exporting, layer 3 of 96" in terminal.getvalue()


def test_what_is_no_terminal_is_told_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with working("tracing") as progress:
        progress("exporting", 3, 96)
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("stream", "patience"), [(Terminal, 0.0), (Terminal, 1e6), (io.StringIO, 0.0)])
def test_a_terminal_shows_a_line_after_a_while_and_loses_it_at_the_end(
    stream: type[io.StringIO], patience: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = stream()
    monkeypatch.setattr(sys, "stderr", shown)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    with progress.line_on_terminal() as told:
        told("exporting", 1, 3)
        told("a remark of many words " * 20, 0, 0)
        told("normalising", 0, 0)
    if stream is Terminal and patience == 0:
        lines = shown.getvalue().split("\r")
        assert lines[1] == "tracing: exporting, layer 1 of 3 ...\x1b[K"
        assert lines[2].endswith("...\x1b[K\n")
        assert lines[3:] == ["tracing: normalising ...\x1b[K", "\x1b[K"]
    else:
        assert shown.getvalue() == ""


def test_operations_show_a_line_after_a_while_and_remove_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(terminal_line, "PATIENCE", 0.01)
    with terminal_line.noted_on_terminal("folding"), terminal_line.noted_on_terminal("inside"):
        deadline = time.monotonic() + 10
        while not terminal.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert terminal.getvalue() == f"\rfolding ...{CLEAR_REST}\r{CLEAR_REST}"


def test_operations_show_nothing_if_they_are_quick_or_something_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with terminal_line.noted_on_terminal("folding"):
        pass
    assert terminal.getvalue() == ""
    monkeypatch.setattr(terminal_line, "PATIENCE", 0.0)
    monkeypatch.setenv("TERM", "dumb")
    with working("merging"), terminal_line.noted_on_terminal("folding"):
        time.sleep(0.05)
    assert "folding" not in terminal.getvalue()
