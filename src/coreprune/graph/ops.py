"""What is known about operations: one table, read by tracing, selection, repair, certificates and latency.

An operation is named by its namespace and name, as in `mylib::add`. Operations of ATen are written without the
namespace, and without the underscore of in-place variants: `aten.add_.Tensor` is `add`. Where torch has several names
for one operation, the others are aliases in its row: `multiply` is `mul`.

Some columns are claims: homogeneous, lipschitz, zero, one_sided, bijective, identity. Theorems, merges and repair rely
on them, and tests/graph/test_ops.py checks each one against torch. A row without a claim says nothing about it.

To add an operation, add its name to a row of the same kind, or a row. A new kind needs a rule in `rules/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

Kind = Literal[
    # They make channels from a weight.
    "linear",  # x Wᵀ + b
    "matmul",  # a @ b, of which either may be a weight
    "addmm",  # c + a @ b
    "grouped matmul",  # one of several stacked weights per row
    "conv",
    "transposed conv",
    "einsum",
    "embedding",  # rows of a weight, by index
    # They read channels, and make none from a weight.
    "attention",
    "recurrent",
    "kernel",  # what a layer becomes below autograd: only the clock sees it
    # One number out for one number in.
    "elementwise",  # any number of tensors, broadcast
    "complex",  # two numbers become one complex number
    "real",  # and back
    "like",  # of the first argument alone; the place of a number may matter
    "prelu",
    # Numbers that change their place.
    "move",  # every number of the output is one of the input
    "pad",
    "cat",
    "stack",
    "expand as",
    "channel shuffle",
    "pixel shuffle",
    "patches",  # im2col
    "folding",  # and back
    "getitem",
    "index",  # places that are computed
    "one hot",
    "scatter",  # reads or writes places that are computed, along one axis
    "write",  # into a part of a tensor
    # Numbers that meet along an axis.
    "channel norm",  # one set of statistics per channel
    "layer norm",
    "group norm",
    "sum",
    "mean",
    "spread",  # variance and standard deviation
    "vector norm",
    "reduction",
    "mixing",  # softmax, cumsum: along one axis, which stays
    "fourier",
    "ranking",  # top k
    "gated",  # glu: one half of an axis times a function of the other
    "spatial",  # every channel's picture alone: pooling, resampling
    # Nothing of the input.
    "creation",
    "creation like",  # in the shape of the first argument
    "check",
    "region",
    "unknown",
]
_LAYERS = ("linear", "matmul", "addmm", "grouped matmul", "conv", "transposed conv", "einsum", "embedding")


@dataclass(frozen=True)
class Operation:
    """One operation, or several that differ in nothing that matters here.

    Attributes:
        names: separated by spaces; with a namespace unless it is ATen's.
        kind: what it does with channels; the rules for tracing are chosen by it.
        aliases: other names that torch has for it. Only in rows of one name.
        product: its time is that of the multiply-accumulates of a convolution or matrix product.
        space: how many spatial axes there are behind the channels; 0 if that depends on the input.
        dim: the position of the argument that names an axis.
        identity: returns its first argument in evaluation mode.
        bijective: every number of the input is in the output once, at a place that the arguments alone decide.
        homogeneous: f(λx) = λ f(x) for λ ≥ 0, of all its tensors at once; for prelu of the first.
        lipschitz: the smallest known L with |f(s) − f(t)| ≤ L |s − t|; infinite where none is claimed.
        zero: f(0) = 0.
        one_sided: f(s) = s for s ≥ 0 and 0 for s ≤ 0.
        keeps_sign: no number of the output is negative where none of its tensors holds a negative one.
        nonnegative: whether the output is never negative, whatever the tensors hold, for the arguments after the first.
        function: for activations, the function of one tensor that the theorems mean.
        holds: whether the claims hold for a call; it gets the arguments after the first. None: they always do.
    """

    names: str
    kind: Kind
    aliases: str = ""
    product: bool = False
    space: int = 0
    dim: int = 1
    identity: bool = False
    bijective: bool = False
    homogeneous: bool = False
    lipschitz: float = math.inf
    zero: bool = False
    one_sided: bool = False
    keeps_sign: bool = False
    nonnegative: Callable[..., bool] | None = None
    function: Callable[[Tensor], Tensor] | None = None
    holds: Callable[..., bool] | None = None

    @property
    def makes_channels(self) -> bool:
        """Whether it can make new channels from a weight."""
        return self.kind in _LAYERS

    def holds_for(self, node: fx.Node) -> bool:
        """Whether the claims of this row hold for the arguments of a call."""
        return self.holds is None or _said(self.holds, node)

    def nonnegative_for(self, node: fx.Node) -> bool:
        """Whether no number that a call returns is negative, whatever its tensors hold."""
        return self.nonnegative is not None and self.holds_for(node) and _said(self.nonnegative, node)


def _said(claim: Callable[..., bool], node: fx.Node) -> bool:
    try:
        return bool(claim(*node.args[1:], **node.kwargs))
    except TypeError:  # arguments by other names: nothing is claimed
        return False


def _always(*_: Any, **__: Any) -> bool:
    return True


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _at_rest(p: float = 0.5, train: bool = True) -> bool:
    """Dropout that drops nothing."""
    return not train or p == 0


def _tensors_only(other: Any, **_: Any) -> bool:
    return not _number(other)


def _by_a_number(other: Any, *, rounding_mode: str | None = None) -> bool:
    return _number(other) and rounding_mode is None


def _with_zeros(*args: Any, value: Any = 0, **_: Any) -> bool:
    return not value and not any(a for a in args if _number(a))


def _stays_real(*args: Any, **kwargs: Any) -> bool:
    """A conversion that rounds nothing to whole numbers."""
    kinds = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)]
    others = [a.meta["val"].dtype for a in args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
    return all(k.is_floating_point for k in (*kinds, *others))


TABLE: tuple[Operation, ...] = (
    # --- layers and products ------------------------------------------------------------------------------------------
    Operation("linear", "linear", product=True),
    Operation("mm bmm mv dot", "matmul", product=True),
    Operation("matmul", "matmul", aliases="linalg_matmul", product=True),
    Operation("addmm baddbmm", "addmm", product=True),
    Operation("_grouped_mm transformers::grouped_mm_fallback", "grouped matmul", product=True),
    Operation("conv1d", "conv", product=True, space=1),
    Operation("conv2d", "conv", product=True, space=2),
    Operation("conv3d", "conv", product=True, space=3),
    Operation("conv_transpose1d", "transposed conv", product=True, space=1),
    Operation("conv_transpose2d", "transposed conv", product=True, space=2),
    Operation("conv_transpose3d", "transposed conv", product=True, space=3),
    Operation("einsum", "einsum", product=True),
    Operation("embedding embedding_bag _embedding_bag _embedding_bag_forward_only", "embedding"),
    Operation("scaled_dot_product_attention", "attention", product=True),
    Operation("lstm gru rnn_tanh rnn_relu", "recurrent", product=True),
    Operation(
        """
        convolution _convolution _convolution_mode convolution_overrideable conv_tbc
        cudnn_convolution cudnn_convolution_transpose cudnn_convolution_relu cudnn_convolution_add_relu
        miopen_convolution miopen_convolution_transpose miopen_convolution_relu miopen_convolution_add_relu
        miopen_depthwise_convolution mkldnn_convolution _mps_convolution _mps_convolution_transpose
        _nnpack_spatial_convolution _conv_depthwise2d conv_depthwise3d thnn_conv2d _slow_conv2d_forward slow_conv3d
        slow_conv3d_forward slow_conv_dilated2d slow_conv_dilated3d slow_conv_transpose2d slow_conv_transpose3d
        mkldnn::_convolution_pointwise mkldnn::_convolution_transpose_pointwise torchvision::deform_conv2d
        quantized::conv1d quantized::conv2d quantized::conv3d quantized::conv1d_relu quantized::conv2d_relu
        quantized::conv3d_relu
        """,
        "kernel",
        product=True,
    ),
    Operation(
        """
        addbmm addmv vdot bilinear _trilinear chain_matmul tensordot mkldnn_linear _addmm_activation _int_mm _scaled_mm
        _scaled_grouped_mm _sparse_mm _sparse_addmm _weight_int8pack_mm _weight_int4pack_mm
        _weight_int4pack_mm_for_cpu _mixed_dtypes_linear mkldnn::_linear_pointwise mkl::_mkl_linear quantized::linear
        quantized::linear_relu quantized::linear_dynamic
        """,
        "kernel",
        product=True,
    ),
    Operation(
        """
        _scaled_dot_product_attention_math _scaled_dot_product_attention_math_for_mps
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        _scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward
        _cudnn_attention_forward _native_multi_head_attention _triton_multi_head_attention _triton_scaled_dot_attention
        higher_order::flex_attention
        """,
        "kernel",
        product=True,
    ),
    Operation(
        """
        lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell mkldnn_rnn_layer _cudnn_rnn miopen_rnn _lstm_mps
        _thnn_fused_lstm_cell _thnn_fused_gru_cell quantized_lstm quantized_gru
        """,
        "kernel",
        product=True,
    ),
    # --- activations: one number for one number, of which the theorems know something ---------------------------------
    # GELU, SiLU, Mish and Hardswish are steeper than 1; their largest slopes are rounded up.
    Operation(
        "relu",
        "elementwise",
        homogeneous=True,
        lipschitz=1.0,
        zero=True,
        one_sided=True,
        nonnegative=_always,
        function=torch.relu,
    ),
    Operation(
        "leaky_relu",
        "elementwise",
        homogeneous=True,
        lipschitz=1.0,
        zero=True,
        function=F.leaky_relu,
        holds=lambda slope=0.01: 0 <= slope <= 1,
    ),
    Operation("relu6", "elementwise", lipschitz=1.0, zero=True, nonnegative=_always, function=F.relu6),
    Operation(
        "hardtanh",
        "elementwise",
        lipschitz=1.0,
        zero=True,
        nonnegative=lambda low=-1.0, high=1.0: 0 <= low <= high,
        function=F.hardtanh,
        holds=lambda low=-1.0, high=1.0: low <= 0 <= high,
    ),
    Operation("tanh", "elementwise", lipschitz=1.0, zero=True, function=torch.tanh),
    Operation(
        "elu",
        "elementwise",
        lipschitz=1.0,
        zero=True,
        function=F.elu,
        holds=lambda alpha=1.0, scale=1.0, input_scale=1.0: (alpha, scale, input_scale) == (1.0, 1.0, 1.0),
    ),
    Operation("gelu", "elementwise", lipschitz=1.1290, zero=True, function=F.gelu),
    Operation("silu", "elementwise", lipschitz=1.0999, zero=True, function=F.silu),
    Operation("mish", "elementwise", lipschitz=1.0887, zero=True, function=F.mish),
    Operation("hardswish", "elementwise", lipschitz=1.5, zero=True, function=F.hardswish),
    Operation(
        "sigmoid",
        "elementwise",
        aliases="special_expit",
        lipschitz=0.25,
        nonnegative=_always,
        function=torch.sigmoid,
    ),
    Operation(
        "softplus",
        "elementwise",
        lipschitz=1.0,
        nonnegative=_always,
        function=F.softplus,
        holds=lambda beta=1.0, threshold=20.0: (beta, threshold) == (1.0, 20.0),
    ),
    # --- other element-wise operations; those that torch tags as such need no row -------------------------------------
    Operation(
        "abs", "elementwise", aliases="absolute", homogeneous=True, lipschitz=1.0, zero=True, nonnegative=_always
    ),
    Operation("neg", "elementwise", aliases="negative", homogeneous=True, lipschitz=1.0, zero=True),
    Operation("add", "elementwise", homogeneous=True, holds=_tensors_only),
    Operation("sub", "elementwise", aliases="subtract", homogeneous=True, holds=_tensors_only),
    Operation("mul", "elementwise", aliases="multiply", homogeneous=True, holds=_by_a_number),
    Operation("div", "elementwise", aliases="divide true_divide", homogeneous=True, holds=_by_a_number),
    Operation(
        "clamp",
        "elementwise",
        aliases="clip",
        nonnegative=lambda low=None, high=None: _number(low) and low >= 0 and (high is None or high >= low),
    ),
    Operation("trunc", "elementwise", aliases="fix"),
    Operation("gt", "elementwise", aliases="greater"),
    Operation("ge", "elementwise", aliases="greater_equal"),
    Operation("lt", "elementwise", aliases="less"),
    Operation("le", "elementwise", aliases="less_equal"),
    Operation("ne", "elementwise", aliases="not_equal"),
    Operation("acos", "elementwise", aliases="arccos"),
    Operation("asin", "elementwise", aliases="arcsin"),
    Operation("atan", "elementwise", aliases="arctan"),
    Operation("acosh", "elementwise", aliases="arccosh"),
    Operation("asinh", "elementwise", aliases="arcsinh"),
    Operation("atanh", "elementwise", aliases="arctanh"),
    Operation("atan2", "elementwise", aliases="arctan2"),
    Operation("erf", "elementwise", aliases="special_erf"),
    Operation("erfc", "elementwise", aliases="special_erfc"),
    Operation("exp2", "elementwise", aliases="special_exp2"),
    Operation("expm1", "elementwise", aliases="special_expm1"),
    Operation("log1p", "elementwise", aliases="special_log1p"),
    Operation("round", "elementwise", aliases="special_round"),
    Operation("xlogy", "elementwise", aliases="special_xlogy"),
    Operation(
        """
        masked_fill where rrelu isin fill hardsigmoid selu celu softshrink hardshrink log_sigmoid threshold square
        __and__ __or__ __xor__ logical_and logical_or logical_not logical_xor lerp addcmul addcdiv rsub
        complex polar conj _conj resolve_conj resolve_neg
        """,
        "elementwise",
    ),
    Operation("view_as_complex", "complex"),
    Operation("view_as_real", "real"),
    Operation("prelu", "prelu", homogeneous=True),
    Operation(
        "dropout feature_dropout alpha_dropout feature_alpha_dropout",
        "like",
        identity=True,
        bijective=True,
        homogeneous=True,
        keeps_sign=True,
        holds=_at_rest,
    ),
    Operation("to _to_copy type_as", "like", homogeneous=True, keeps_sign=True, holds=_stays_real),
    Operation("tril triu", "like", homogeneous=True, keeps_sign=True),
    Operation("bernoulli nan_to_num", "like"),
    # --- movements ----------------------------------------------------------------------------------------------------
    Operation(
        "contiguous clone alias detach lift_fresh lift_fresh_copy",
        "move",
        identity=True,
        bijective=True,
        homogeneous=True,
        keeps_sign=True,
    ),
    Operation(
        """
        view reshape _unsafe_view view_as reshape_as flatten unflatten squeeze unsqueeze permute t numpy_T mT flip roll
        rot90 pixel_unshuffle
        """,
        "move",
        bijective=True,
        homogeneous=True,
        keeps_sign=True,
    ),
    Operation("transpose", "move", aliases="swapaxes swapdims", bijective=True, homogeneous=True, keeps_sign=True),
    Operation("movedim", "move", aliases="moveaxis", bijective=True, homogeneous=True, keeps_sign=True),
    Operation(
        """
        slice select narrow expand unbind split split_with_sizes tensor_split chunk unsafe_split unsafe_chunk repeat
        tile repeat_interleave diagonal unfold
        """,
        "move",
        homogeneous=True,
        keeps_sign=True,
    ),
    Operation("pad constant_pad_nd", "pad", homogeneous=True, keeps_sign=True, holds=_with_zeros),
    Operation("cat", "cat", aliases="concat concatenate", homogeneous=True, keeps_sign=True),
    Operation("stack", "stack", homogeneous=True, keeps_sign=True),
    Operation("expand_as", "expand as"),
    Operation(
        "channel_shuffle native_channel_shuffle", "channel shuffle", bijective=True, homogeneous=True, keeps_sign=True
    ),
    Operation("pixel_shuffle", "pixel shuffle", bijective=True, homogeneous=True, keeps_sign=True),
    Operation("im2col", "patches"),
    Operation("col2im", "folding"),
    Operation("operator::getitem", "getitem", homogeneous=True, keeps_sign=True),
    Operation("index_select", "index", homogeneous=True, keeps_sign=True),
    Operation("index", "index"),
    Operation("one_hot", "one hot"),
    Operation("gather scatter scatter_add scatter_reduce index_add index_copy index_reduce index_fill", "scatter"),
    Operation("copy slice_scatter select_scatter index_put masked_scatter", "write"),
    # --- along an axis ------------------------------------------------------------------------------------------------
    Operation("batch_norm instance_norm _native_batch_norm_legit_no_training cudnn_batch_norm", "channel norm"),
    Operation("layer_norm rms_norm native_layer_norm", "layer norm"),
    Operation("group_norm", "group norm"),
    Operation("sum nansum", "sum", homogeneous=True, keeps_sign=True),
    Operation("mean", "mean", homogeneous=True, keeps_sign=True),
    Operation("var std var_mean std_mean", "spread"),
    Operation("norm linalg_vector_norm", "vector norm", dim=2),
    Operation("amax amin max min", "reduction", homogeneous=True, keeps_sign=True),
    Operation("logsumexp", "reduction", aliases="special_logsumexp"),
    Operation("prod any all argmax argmin median nanmedian mode count_nonzero", "reduction"),
    Operation("softmax", "mixing", aliases="special_softmax", nonnegative=_always),
    Operation("log_softmax", "mixing", aliases="special_log_softmax"),
    Operation("_softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort", "mixing"),
    Operation("topk kthvalue", "ranking", dim=2),
    Operation("glu", "gated"),
    Operation("fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", "fourier", space=1, dim=2),
    Operation("fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2", "fourier", space=2, dim=2),
    Operation("fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn", "fourier", dim=2),
    # --- every channel's picture alone --------------------------------------------------------------------------------
    Operation(
        """
        max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d upsample_nearest1d upsample_linear1d
        reflection_pad1d replication_pad1d
        """,
        "spatial",
        space=1,
        homogeneous=True,
        keeps_sign=True,
    ),
    Operation(
        """
        max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d _adaptive_avg_pool2d
        upsample_nearest2d _upsample_nearest_exact2d upsample_bilinear2d _upsample_bilinear2d_aa
        reflection_pad2d replication_pad2d
        """,
        "spatial",
        space=2,
        homogeneous=True,
        keeps_sign=True,
    ),
    Operation("upsample_bicubic2d _upsample_bicubic2d_aa", "spatial", space=2, homogeneous=True),
    Operation(
        """
        max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d _adaptive_avg_pool3d upsample_nearest3d
        upsample_trilinear3d reflection_pad3d replication_pad3d
        """,
        "spatial",
        space=3,
        homogeneous=True,
        keeps_sign=True,
    ),
    Operation("grid_sampler_2d affine_grid_generator", "spatial", space=2),
    Operation("grid_sampler", "spatial"),
    Operation("max_unpool2d", "spatial", space=2),
    Operation("max_unpool3d", "spatial", space=3),
    # --- nothing of the input -----------------------------------------------------------------------------------------
    Operation(
        """
        zeros ones full empty arange scalar_tensor eye linspace rand randn randint new_zeros new_ones new_full new_empty
        tensor empty_permuted sym_size tril_indices triu_indices fft_fftfreq fft_rfftfreq hann_window hamming_window
        """,
        "creation",
    ),
    Operation("zeros_like ones_like full_like empty_like rand_like randn_like", "creation like"),
    Operation("_assert_tensor_metadata _assert_async _assert_scalar sym_constrain_range", "check"),
    Operation("higher_order::wrap_with_set_grad_enabled higher_order::wrap_with_autocast", "region"),
)

OPERATIONS = {name: row for row in TABLE for name in row.names.split()}
ALIASES = {alias: row.names for row in TABLE for alias in row.aliases.split()}
UNKNOWN = Operation("", "unknown")


def op_name(operation: Any) -> str:
    """The name in the table of what a node calls, or of an operation itself; empty for nodes that call nothing."""
    target = operation.target if isinstance(operation, fx.Node) else operation
    if isinstance(target, OpOverload):
        return canonical(target._schema.name)
    if isinstance(target, OpOverloadPacket):
        return canonical(target._qualified_op_name)
    if isinstance(target, HigherOrderOperator):
        return f"{target.namespace}::{target.name()}"
    if callable(target):
        return f"{target.__module__.lstrip('_')}::{target.__name__}"
    return ""


@cache
def canonical(name: str) -> str:
    """The name in the table of "namespace::name": `aten::multiply_` is `mul`. Without a namespace ATen's is meant."""
    namespace, _, own = name.rpartition("::")
    if namespace not in ("", "aten"):
        return name
    own = own if own.startswith("_") else own.rstrip("_")
    return ALIASES.get(own, own)


def operation(node: Any) -> Operation:
    """What is known of the operation that a node calls; a row of kind "unknown" where nothing is."""
    return OPERATIONS.get(op_name(node), UNKNOWN)


def of_kind(*kinds: Kind) -> tuple[str, ...]:
    """The names of every operation of these kinds."""
    return tuple(name for name, row in OPERATIONS.items() if row.kind in kinds)
