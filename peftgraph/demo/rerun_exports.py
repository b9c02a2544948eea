"""Runs exported files again in processes and runtimes without peftgraph, and compares their outputs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from peftgraph.errors import PeftGraphError

# Runs in a Python of its own: isolated (-I), and with an import hook that refuses peftgraph.
PROGRAM = """
import json, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "peftgraph":
            raise ImportError("peftgraph is refused here")

sys.meta_path.insert(0, Refuse())
try:
    import peftgraph
    raise SystemExit("the hook does not refuse peftgraph")
except ImportError:
    pass
import torch
from safetensors.torch import load_file

file, cases = sys.argv[1:]
program = torch.export.load(file)
net, order = program.module(), program.graph_signature.user_inputs
positional, named = program.example_inputs
worst = 0.0
tensors = load_file(cases)
for case in sorted({name.split("/")[0] for name in tensors}):
    own = {name.split("/")[1]: value for name, value in tensors.items() if name.split("/")[0] == case}
    expected = own.pop("expected")
    with torch.no_grad():
        arguments = [own[name] for name in order[:len(positional)]]
        found = net(*arguments, **{name: own[name] for name in named})["last_hidden_state"]
    assert found.shape == expected.shape, (found.shape, expected.shape)
    worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
print(json.dumps({"error": worst, "torch": torch.__version__, "peftgraph_imported": "peftgraph" in sys.modules}))
"""


Cases = Mapping[str, Mapping[str, Tensor]]  # name of a case -> its inputs, and the last hidden state as "expected"


def rerun_pt2(file: Path, cases: Cases) -> dict[str, Any]:
    """Run a `.pt2` file in a fresh Python that cannot import peftgraph.

    Returns:
        The largest relative difference, the version of torch, and evidence that peftgraph was absent.

    Raises:
        PeftGraphError: the process fails.
    """
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cases.safetensors"
        save_file(
            {f"{case}/{name}": t.contiguous() for case, tensors in cases.items() for name, t in tensors.items()},
            path,
        )
        done = subprocess.run(
            [sys.executable, "-I", "-c", PROGRAM, str(file), str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise PeftGraphError(f"{file} does not run in a fresh Python:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def rerun_onnx(file: Path, cases: Cases) -> dict[str, Any] | None:
    """Run an `.onnx` file in onnxruntime and return its largest relative difference; None without onnxruntime."""
    try:
        import onnxruntime
    except ImportError:
        return None
    import numpy as np

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    for tensors in cases.values():
        inputs = {name: value.numpy() for name, value in tensors.items() if name != "expected"}
        found = session.run(["last_hidden_state"], inputs)[0]
        expected = tensors["expected"].numpy()
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return {"error": worst, "onnxruntime": onnxruntime.__version__}


Runner = Callable[[Path, Cases], dict[str, Any] | None]

RUNNERS: Mapping[str, Runner] = {".pt2": rerun_pt2, ".onnx": rerun_onnx}  # by the suffix of the exported file
