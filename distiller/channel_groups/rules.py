"""What each operation does to the ids of its operands, by name of the aten operation.

    moves data          the operation itself, on the ids
    element by element  unites the ids of its operands, broadcast
    layers              tie the ids of operands to those of weights; their outputs have the ids of filters
    over a dimension    (softmax, mean, pooling, flip) nothing may be removed along it
    anything else       nothing that it reads or returns can be removed

Knows nothing about how a network is walked through.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distiller.channel_groups.call import Call, elementwise, opaque
from distiller.channel_groups.convolution import convolution, transposed_convolution
from distiller.channel_groups.data_movement import (
    along,
    channel_shuffle,
    concatenate,
    glu,
    index,
    move,
    move_fixed_along,
    pad,
    pixel_shuffle,
    pool,
    reduce,
    resize,
    split,
)
from distiller.channel_groups.layers import (
    attention,
    batch_norm,
    counted_sum,
    einsum,
    embedding,
    layer_norm,
    linear,
    matmul,
    prelu,
)
from distiller.channel_groups.network_ids import State, Value


def follow(call: Call) -> Value:
    """The value of an operation, and what it unites, fixes and notes on the way."""
    if call.is_of_numbers:
        return State(None, call.compute())
    if call.is_in_counting_norm and call.name == "sum":
        return counted_sum(call)
    rule = RULES.get(call.name)
    if rule is None:
        tags = getattr(call.target, "tags", ())
        rule = elementwise if torch.Tag.pointwise in tags else opaque
    return rule(call)


def _pass(call: Call) -> Value:
    return next((value for value in call.args.values() if isinstance(value, (Tensor, State))), None)


def _created(call: Call) -> Value:
    return None


def _of(rule: Callable[[Call], Value], names: str) -> dict[str, Callable[[Call], Value]]:
    return dict.fromkeys(names.split(), rule)


RULES: dict[str, Callable[[Call], Value]] = {
    **_of(_pass, "alias clone contiguous detach lift_fresh lift_fresh_copy to _to_copy dropout "
          "feature_dropout alpha_dropout feature_alpha_dropout type_as float half bfloat16 fill masked_fill"),
    **_of(_created, "zeros ones full empty arange rand randn zeros_like ones_like full_like empty_like "
          "rand_like randn_like new_zeros new_ones new_full new_empty scalar_tensor zero"),
    **_of(elementwise, "relu6 hardswish where clamp hardtanh"),
    **_of(move, "view reshape _unsafe_view view_as reshape_as permute transpose t swapaxes movedim numpy_T "
          "unsqueeze squeeze expand expand_as flatten unflatten pixel_unshuffle"),
    **_of(move_fixed_along("dim"), "select slice narrow unbind index_select"),
    **_of(move_fixed_along("dims"), "roll flip"),
    **_of(split, "chunk split split_with_sizes tensor_split"),
    **_of(concatenate, "cat concat concatenate stack"),
    **_of(pool, " ".join(f"{kind}{n}d" for n in (1, 2, 3) for kind in (
        "max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool"))),
    **_of(resize, "upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear2d "
          "upsample_linear1d upsample_trilinear3d upsample_bicubic2d _upsample_nearest_exact2d"),
    **_of(pad, "pad constant_pad_nd reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d"),
    **_of(reduce, "mean sum amax amin var std linalg_vector_norm norm logsumexp"),
    **_of(along, "softmax log_softmax cumsum"),
    **_of(glu, "glu"),
    **_of(index, "index"),
    **_of(pixel_shuffle, "pixel_shuffle"),
    **_of(channel_shuffle, "channel_shuffle"),
    **_of(batch_norm, "batch_norm instance_norm"),
    **_of(layer_norm, "layer_norm rms_norm"),
    **_of(prelu, "prelu"),
    **_of(embedding, "embedding"),
    **_of(linear, "linear"),
    **_of(matmul, "matmul mm bmm"),
    **_of(einsum, "einsum"),
    **_of(attention, "scaled_dot_product_attention"),
    **_of(convolution, "conv1d conv2d conv3d"),
    **_of(transposed_convolution, "conv_transpose1d conv_transpose2d conv_transpose3d"),
}  # fmt: skip
