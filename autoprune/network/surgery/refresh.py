"""Attributes of torch's own modules that repeat a width: made to say what the parameters say."""

from __future__ import annotations

from torch import Tensor, nn

from autoprune.network.graph.rules.recurrent import _GATES
from autoprune.network.surgery.attention import refresh_multihead
from autoprune.network.surgery.hooked_weights import make_weights


def refresh_recurrent(module: nn.RNNBase | nn.RNNCellBase) -> None:
    """Makes a recurrent module's sizes and flat list of weights say what its parameters say."""
    if isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]
        return
    gates = _GATES[module.mode.lower()]
    w_hh = module.weight_hh_l0
    assert isinstance(w_hh, nn.Parameter)
    module.hidden_size = w_hh.shape[0] // gates
    w_ih = module.weight_ih_l0
    assert isinstance(w_ih, nn.Parameter)
    module.input_size = w_ih.shape[1]
    if module.proj_size > 0:
        module.proj_size = w_hh.shape[1]
    module._init_flat_weights()


def refresh_attributes(module: nn.Module, *, depthwise: bool = False) -> None:
    """Makes a module's attributes that repeat a width say what its parameters say."""
    make_weights(module)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        if depthwise:
            module.groups = module.weight.shape[0] // (module.out_channels // module.groups)
        first, second = module.weight.shape[0], module.weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        refresh_recurrent(module)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, (nn.modules.batchnorm._NormBase,)):
        size = module.weight if module.weight is not None else module.running_mean
        if size is not None:
            module.num_features = size.shape[0]
    elif isinstance(module, nn.LayerNorm):
        if isinstance(weight, Tensor):
            module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, nn.GroupNorm):
        if isinstance(weight, Tensor):
            module.num_channels = weight.shape[0]
    elif isinstance(module, nn.MultiheadAttention):
        refresh_multihead(module)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
