"""The command line keeps traces, unless it is told not to, and shows and empties the folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peftgraph.capture import trace_model
from peftgraph.utils.cache_folder import cached_files


def test_a_second_command_needs_no_trace(cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFTGRAPH_CACHE", str(tmp_path))
    assert cli("cache").stdout.strip().endswith("0 traces, 0.0 MB of at most 268 MB; --clear removes them")
    first = cli("--no-cache", "inspect", folder, "--json")
    assert cached_files(tmp_path) == []
    second = cli("inspect", folder, "--json")
    ((path, state),) = cached_files(tmp_path)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was exported")

    monkeypatch.setattr(trace_model, "export_fake_copy", refuse)
    third = cli("inspect", folder, "--json")
    assert json.loads(first.stdout) == json.loads(second.stdout) == json.loads(third.stdout)
    assert cli("apply", folder, "--recipe", "lora{rank=2}").exit_code == 0
    assert cli("--no-cache", "inspect", folder).exit_code == 3  # it is traced again
    assert f"1 traces, {state.st_size / 1e6:.1f} MB" in cli("cache").stdout
    assert "1 traces removed" in cli("cache", "--clear").stdout
    assert not path.exists()
