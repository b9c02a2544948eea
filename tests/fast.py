"""The mark `fast`: a part of the tests that says within two minutes whether a change broke something common."""

from __future__ import annotations

from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = """
    capture/test_assume capture/test_progress capture/test_refusals cli/test_errors folding/test_proof
    interop/test_write_back ir/test_propagate ir/test_text ir/test_verify
    methods/test_adapter_fusion methods/test_adapter_plus methods/test_bitfit methods/test_ciat methods/test_compacter
    methods/test_dora methods/test_freeze methods/test_houlsby methods/test_mam methods/test_parallel_adapter
    methods/test_pfeiffer methods/test_unipelt patterns/test_text references/test_adapter_compositions
    rewrite/test_apply rewrite/test_hostile rewrite/test_shared rewrite/test_specs rewrite/test_state
    runtime/test_copying runtime/test_direct runtime/test_module sites/test_attention_gates sites/test_columns
    sites/test_convolutions sites/test_einsum sites/test_roles sites/test_select sites/test_softmax
    test_losses test_prompts test_site
""".split()


def pytest_configure(config: pytest.Config) -> None:
    """Register the mark."""
    config.addinivalue_line("markers", "fast: a sample of every room, under two minutes in all")


def mark(items: list[pytest.Item]) -> None:
    """Mark the tests of the listed files.

    Raises:
        UsageError: a listed file does not exist.
    """
    missing = [name for name in FILES if not (HERE / f"{name}.py").exists()]
    if missing:
        raise pytest.UsageError(f"tests/fast.py names no file by {', '.join(missing)}")
    for item in items:
        if item.path.relative_to(HERE).with_suffix("").as_posix() in FILES:
            item.add_marker(pytest.mark.fast)
