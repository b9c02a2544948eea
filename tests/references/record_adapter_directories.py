"""Records directories that the `adapters` library saves: tiny models, adapters with random weights, and their outputs.

They lie in `adapter_directories/MODEL.METHOD/`, each with `expected.safetensors`: what the library answers. The models
and the environment are those of `record_adapters.py`. Prefixes are left out: the library cannot write them but as
pickles, since their tensors are shared.

    recorder/bin/python tests/references/record_adapter_directories.py
"""

from __future__ import annotations

from pathlib import Path

import adapters
import torch
from record_adapters import FOLDER, build, inputs
from safetensors.torch import load_file, save_file

METHODS = {
    "houlsby": adapters.DoubleSeqBnConfig(reduction_factor=4),
    "pfeiffer": adapters.SeqBnConfig(reduction_factor=4, leave_out=[0]),
    "parallel": adapters.ParBnConfig(reduction_factor=4),
    "parallel_learned": adapters.ParBnConfig(reduction_factor=4, scaling="learned"),
    "lora": adapters.LoRAConfig(r=2, alpha=6, intermediate_lora=True),
    "ia3": adapters.IA3Config(),
    "compacter": adapters.CompacterConfig(reduction_factor=4, phm_dim=2),
    "prompt": adapters.PromptTuningConfig(prompt_length=3),
}
ALONE = {"parallel_learned", "compacter", "prompt"}  # recorded on BERT alone


def record(name: str, method: str) -> None:
    """Writes one directory."""
    model = build(name)
    adapters.init(model)
    model.add_adapter("one", config=METHODS[method])
    model.set_active_adapters("one")
    generator = torch.Generator().manual_seed(3)
    new = [p for key, p in model.named_parameters() if ".one." in key or "shared_parameters" in key]
    model.double().eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in new}.values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        output = model(**inputs(name)).last_hidden_state
    base = load_file(FOLDER / f"{name}.safetensors")["output"]
    assert output.shape != base.shape or not torch.allclose(output, base, atol=1e-2), "the adapter does nothing"
    folder = Path(__file__).parent / "adapter_directories" / f"{name}.{method}"
    folder.mkdir(parents=True, exist_ok=True)
    model.save_adapter(str(folder), "one", use_safetensors=True)
    save_file({"output": output.contiguous()}, folder / "expected.safetensors")


if __name__ == "__main__":
    for model_name in ("bert", "gpt2", "llama"):
        for method_name in METHODS:
            if model_name == "bert" or method_name not in ALONE:
                record(model_name, method_name)
                print(model_name, method_name)
