"""Models that can be exported only with their library's patches, and what is checked then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from transformers import masking_utils
from transformers.activations import NewGELUActivation

import peftgraph as pg
from peftgraph.capture.example_inputs import bind_example
from peftgraph.capture.transformers_patches import library_patches, patch_difference

pytest.importorskip("transformers.exporters")


def packed_images() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A tower that takes images of several sizes as one row of patches, and cuts it by the values of a tensor."""
    from transformers.exporters.utils import precompute_export_inputs
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

    sizes: dict[str, Any] = {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "mlp_ratio": 2}
    sizes |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "attn_implementation": "sdpa"}
    torch.manual_seed(0)
    tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(**sizes)).eval()
    inputs = {"hidden_states": torch.randn(32, 96), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}
    precompute_export_inputs(tower, inputs)
    return tower, inputs


def first(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.last_hidden_state


def test_a_tower_of_packed_images_is_traced_by_the_patched_form() -> None:
    tower, inputs = packed_images()
    program = pg.trace(tower, inputs)
    assert len(program.sites.select("attention.core")) == 2
    ours, theirs = first(program.module().eval()(**inputs)), first(tower.requires_grad_(False)(**inputs))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_packed_images_of_other_sizes_than_the_examples() -> None:
    from transformers.exporters.utils import precompute_export_inputs

    tower, inputs = packed_images()
    net = pg.trace(tower, inputs).module().eval()
    other = {"hidden_states": torch.randn(56, 96), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 8], [1, 6, 4]])}
    precompute_export_inputs(tower, other)
    ours, theirs = first(net(**other)), first(tower.requires_grad_(False)(**other))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def is_flash_attention_requested(_: object) -> bool:
    return False


class Kernels:
    """The library's table of attention functions, as its models use it."""

    def get_interface(self, *_: object) -> Any:
        return lambda module, q, k, v, **_: (nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2), None)


ALL_ATTENTION_FUNCTIONS = Kernels()


class NormedAttention(nn.Module):
    """Attention within packed pictures, in the library's form, with normed queries and keys of fewer heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, width) for width in (12, 12, 12, 12))
        self.norm, self.act = nn.LayerNorm(6), NewGELUActivation()

    def forward(self, hidden_states: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        length = hidden_states.shape[0]
        q, k, v = (one(hidden_states).view(length, 2, 6).transpose(0, 1)[None] for one in (self.q, self.k, self.v))
        q, k, attend = self.norm(q), self.norm(k), ALL_ATTENTION_FUNCTIONS.get_interface(None, None)
        if is_flash_attention_requested(None):
            y, _ = attend(self, q, k, v, attention_mask=None, cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens)
        else:
            lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).tolist()
            parts = [torch.split(one, lengths, dim=2) for one in (q, k, v)]
            y = torch.cat([attend(self, *one)[0] for one in zip(*parts, strict=True)], dim=1)
        return self.o(self.act(y.reshape(length, -1)))


def test_packed_attention_runs_the_models_own_code() -> None:
    torch.manual_seed(0)
    model = NormedAttention().requires_grad_(False)
    net = pg.trace(model, {"hidden_states": torch.randn(8, 12), "cu_seqlens": torch.tensor([0, 3, 8])}).module()
    inputs = {"hidden_states": torch.randn(11, 12), "cu_seqlens": torch.tensor([0, 2, 6, 11])}
    torch.testing.assert_close(net.eval()(**inputs), model(**inputs), rtol=0, atol=1e-6)
    assert not is_flash_attention_requested(None), "what is patched while tracing is put back"


def test_a_patched_form_that_gives_other_values_is_told_from_the_model() -> None:
    tower, inputs = packed_images()
    bound = bind_example(tower, inputs)
    with torch.no_grad():
        right = [one for one in tower(**inputs).values() if isinstance(one, torch.Tensor)]
    assert patch_difference(tower, bound, right) is None
    assert "gives other values" in str(patch_difference(tower, bound, [one + 1 for one in right]))
    assert "instead of" in str(patch_difference(tower, bound, right[:-1]))
    assert "on the meta device" in str(patch_difference(tower.to("meta"), bound, right))


def test_only_the_librarys_own_models_are_patched() -> None:
    assert library_patches(nn.Linear(2, 2)) is None
    assert library_patches(packed_images()[0]) is not None


class Masked(nn.Linear):
    """Rows summed under a mask of pairs, which the library's own function makes under vmap."""

    def forward(self, input: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        batch, length = padding.shape
        function = masking_utils._vmap_expansion_sdpa(lambda b, h, q, k: (k <= q) & (padding[b, k] > 0))
        with TransformGetItemToIndex():
            mask = function(*(torch.arange(size) for size in (batch, 1, length, length)))
        return mask[:, 0].to(input.dtype) @ super().forward(input)


def test_a_mask_made_under_vmap_is_broadcast() -> None:
    model = Masked(6, 5).requires_grad_(False)
    program = pg.trace(model, {"input": torch.ones(3, 7, 6), "padding": torch.ones(3, 7, dtype=torch.long)})
    assert not any("vmap" in str(node.target) or "batch_dim" in str(node.target) for node in program.graph.nodes)
    padding = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    x = torch.randn(2, 4, 6)
    assert torch.equal(program.module()(x, padding), model(x, padding))
