"""The vocabulary: which aten operators move data, scale it, bend it or contract it.

Operators are named by their schema without namespace and in-place underscore, so
`aten.div_.Tensor` reads "div".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import fx


def words(*lines: str) -> frozenset[str]:
    """Return the words of some lines, as a set."""
    return frozenset(" ".join(lines).split())


LAYOUT: Final = words(
    "view reshape _unsafe_view transpose permute t numpy_T movedim swapaxes contiguous clone expand",
    "expand_as view_as reshape_as squeeze unsqueeze flatten unflatten slice select narrow split",
    "split_with_sizes chunk unbind getitem cat concat stack repeat repeat_interleave roll flip index",
    "index_select gather pad constant_pad_nd unfold alias lift_fresh_copy view_as_real",
    "view_as_complex detach slice_scatter select_scatter tile hstack vstack pixel_unshuffle",
    "pixel_shuffle broadcast_to tensor_split take_along_dim mH mT",
)
CUT: Final = words("slice select narrow getitem index index_select gather")
SCATTER: Final = words("slice_scatter select_scatter index_copy")
# What takes the size or the dtype of its last operand, and what takes nothing else of its operand.
LIKE: Final = words("expand_as view_as reshape_as type_as")
FILLED: Final = words(
    "new_empty new_zeros new_ones new_full new_empty_strided empty_like zeros_like ones_like full_like",
    "rand_like randn_like",
)
CAST: Final = words("to _to_copy type_as float half double bfloat16")
DROPOUT: Final = words("dropout native_dropout alpha_dropout feature_dropout bernoulli by_mode")
NONLINEAR: Final = words(
    "gelu silu relu tanh sigmoid mish leaky_relu elu selu celu softplus hardswish hardsigmoid",
    "hardtanh relu6 erf exp pow square prelu logsigmoid log_sigmoid softsign glu swish threshold",
    "rrelu softmax _softmax expm1 log1p sin abs minimum maximum",
)
REDUCTION: Final = words("mean sum var std norm linalg_vector_norm amax amin max min prod logsumexp var_mean std_mean")
# These normalise [batch, features, ...], where the others normalise [..., features].
IMAGE_NORM: Final = words(
    "group_norm native_group_norm batch_norm _native_batch_norm_legit _batch_norm_impl_index instance_norm",
    "cudnn_batch_norm",
)
NORM: Final = words("layer_norm native_layer_norm rms_norm _fused_rms_norm") | IMAGE_NORM
CONV: Final = words("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution")
SDPA: Final = words(
    "scaled_dot_product_attention _scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention _scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_cudnn_attention",
)
SOFTMAX: Final = words("softmax _softmax _safe_softmax")
GROUPED: Final = words("_grouped_mm grouped_mm grouped_mm_fallback")
CONTRACTION: Final = words("linear addmm mm matmul bmm baddbmm einsum dot mv") | GROUPED
POOLING: Final = words(
    "avg_pool1d avg_pool2d max_pool1d max_pool2d adaptive_avg_pool1d adaptive_avg_pool2d fft_fft",
    "fft_fftn fft_fft2 fft_rfft fft_rfft2 cumsum lstm gru",
)
CHOICE: Final = words("topk argmax argsort sort kthvalue one_hot multinomial")
COMPLEX: Final = words("view_as_real view_as_complex")
SCALE: Final = words("mul div multiply divide true_divide neg")
MASKING: Final = words(
    "add sub rsub where masked_fill clamp clamp_min clamp_max tanh nan_to_num maximum minimum",
    "masked_fill_ abs",
)


ELEMENTWISE: Final = {"max": "maximum", "min": "minimum"}  # of two tensors; of one they reduce


def name(node: fx.Node) -> str:
    """Return the operator's bare name: "linear", "div" for div_, "getitem"; the node kind where it calls nothing."""
    if node.op != "call_function":
        return node.op
    schema = getattr(node.target, "_schema", None)
    text: str = schema.name.split("::")[-1] if schema is not None else getattr(node.target, "__name__", "")
    if text in ELEMENTWISE and schema is not None and schema.overload_name == "other":
        return ELEMENTWISE[text]
    return text if text.startswith("__") else text.rstrip("_")


def bends(node: fx.Node) -> bool:
    """Tell whether a node is a nonlinearity, or an autograd function whose forward consists of one."""
    return name(node) in NONLINEAR or not NONLINEAR.isdisjoint(node.meta.get("operators", ()))


def is_softmax(node: fx.Node) -> bool:
    """Tell whether a node is a softmax, or an autograd function whose forward consists of one, and masks."""
    inside = node.meta.get("operators", frozenset[str]())
    return name(node) in SOFTMAX or (not SOFTMAX.isdisjoint(inside) and CONTRACTION.isdisjoint(inside))


def argument(node: fx.Node, position: int, keyword: str) -> object:
    """Return a call's argument, however it was passed; None where it was left out."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(keyword)


def operand(node: fx.Node, position: int, keyword: str) -> fx.Node | None:
    from torch import fx  # here, so that the words above are read without torch

    value = argument(node, position, keyword)
    return value if isinstance(value, fx.Node) else None
