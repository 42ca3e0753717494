"""Attention modules that may lose heads: the same parameters and results as the originals, without their asserts.

`nn.MultiheadAttention` insists that heads times their width is the width of its input, and torchvision's window
attention computes one from the other; neither runs with a head less. Decides which classes are replaced, by what, and
that a state dict fits both. The replacement is another forward pass over the same parameters, buffers and attributes.
Knows nothing of labels, groups or policies.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.network.graph.copies import keeps_graph, without_graph


class MultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with any number of heads of any width, always by `scaled_dot_product_attention` or in
    plain operators.

    Nested tensors are not accepted.
    """

    scale: float

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Maps `(L, E)`, `(L, N, E)` or, batch first, `(N, L, E)` as the original does."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal needs attn_mask, as in torch.nn.MultiheadAttention")
        batched = query.dim() == 3
        q, k, v = self._projected(*self._batch_first((query, key, value)))  # (N, L or S, H * D)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], -1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q, k, v = (
            t.view(t.shape[0], t.shape[1], self.num_heads, self.head_dim).transpose(1, 2)  # (N, H, L or S, D)
            for t in (q, k, v)
        )
        mask = self._mask(attn_mask, key_padding_mask, like=k, length=q.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            logits = (q * self.scale) @ k.transpose(-2, -1)
            weights = (logits if mask is None else logits + mask).softmax(-1)  # (N, H, L, S)
            weights = F.dropout(weights, dropout)
            out = weights @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, scale=self.scale)
        out = self.out_proj(out.transpose(1, 2).flatten(2))  # (N, L, E)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _batch_first(self, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Returns the inputs as `(N, L, E)`; what was one tensor stays one."""
        seen: dict[int, Tensor] = {}
        for x in inputs:
            if id(x) not in seen:
                batched = x if self.batch_first else x.transpose(0, 1)
                seen[id(x)] = batched if x.dim() == 3 else x.unsqueeze(0)
        return tuple(seen[id(x)] for x in inputs)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        packed, bias = self.in_proj_weight, self.in_proj_bias
        if packed is not None and query is key and key is value:
            return F.linear(query, packed, bias).chunk(3, -1)
        weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, like: Tensor, length: int
    ) -> Tensor | None:
        """Returns one additive mask that broadcasts to `(N, H, L, S)`."""
        found: Tensor | None = None
        if attn_mask is not None:
            found = _additive(attn_mask, like)
            if found.dim() == 3:
                found = found.view(-1, self.num_heads, length, found.shape[-1])
        if key_padding_mask is not None:
            padding = _additive(key_padding_mask, like)[:, None, None]  # (N, 1, 1, S)
            found = padding if found is None else found + padding
        if found is not None and found.shape[-1] < like.shape[2]:
            found = F.pad(found, (0, like.shape[2] - found.shape[-1]))  # bias_k, add_zero_attn: always attended
        return found


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


class WindowAttention(nn.Module):
    """torchvision's `ShiftedWindowAttention` and `ShiftedWindowAttentionV2` with any number of heads of any width.

    Source: Liu et al., Swin Transformer, ICCV 2021, and Swin Transformer V2, CVPR 2022.
    """

    qkv: nn.Linear
    proj: nn.Linear
    num_heads: int
    head_dim: int
    scale: float
    window_size: list[int]
    shift_size: list[int]
    attention_dropout: float
    dropout: float
    relative_position_index: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, H, W, C)` to the same shape."""
        wh, ww = self.window_size
        height, width = x.shape[1], x.shape[2]
        x = F.pad(x, (0, 0, 0, -width % ww, 0, -height % wh))
        batch, rows, columns = x.shape[0], x.shape[1], x.shape[2]
        # A window that covers the whole side is not shifted.
        shift = [s if w < n else 0 for s, w, n in zip(self.shift_size, (wh, ww), (rows, columns), strict=True)]
        if any(shift):
            x = torch.roll(x, shifts=(-shift[0], -shift[1]), dims=(1, 2))
        grid = (batch, rows // wh, wh, columns // ww, ww)
        x = x.view(*grid, -1).permute(0, 1, 3, 2, 4, 5).reshape(-1, wh * ww, x.shape[-1])  # (B * nW, N, C)
        x = self._attended(x, self._shift_mask(x, (rows, columns), shift) if any(shift) else None)
        x = x.view(batch, grid[1], grid[3], wh, ww, -1).permute(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)
        if any(shift):
            x = torch.roll(x, shifts=(shift[0], shift[1]), dims=(1, 2))
        return x[:, :height, :width, :].contiguous()

    def _attended(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attends within windows: `(B * nW, N, C)`."""
        windows, tokens = x.shape[0], x.shape[1]
        bias: Tensor | None = self.qkv.bias
        cosine = "logit_scale" in self._parameters
        if cosine and bias is not None:  # keys have no bias
            q_bias, k_bias, v_bias = bias.chunk(3)
            bias = torch.cat([q_bias, torch.zeros_like(k_bias), v_bias])
        qkv = F.linear(x, self.qkv.weight, bias).view(windows, tokens, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B * nW, H, N, D)
        if cosine:
            logit_scale = torch.clamp(self.get_parameter("logit_scale"), max=math.log(100.0)).exp()
            attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * logit_scale
        else:
            attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self._position_bias(tokens)
        if mask is not None:
            attn = attn.view(-1, len(mask), self.num_heads, tokens, tokens) + mask[:, None]
            attn = attn.view(windows, self.num_heads, tokens, tokens)
        attn = F.dropout(attn.softmax(-1), self.attention_dropout, self.training)
        out = (attn @ v).transpose(1, 2).flatten(2)
        return F.dropout(self.proj(out), self.dropout, self.training)

    def _position_bias(self, tokens: int) -> Tensor:
        """Returns `(H, N, N)`."""
        if "logit_scale" not in self._parameters:
            table: Tensor = self.get_parameter("relative_position_bias_table")  # (M, H)
        else:
            coordinates = self.get_buffer("relative_coords_table")
            table = self.get_submodule("cpb_mlp")(coordinates)  # (1, Mh, Mw, H)
            table = table.flatten(0, 2)
        bias = table[self.relative_position_index].view(tokens, tokens, -1).permute(2, 0, 1)
        return 16 * torch.sigmoid(bias) if "logit_scale" in self._parameters else bias

    def _shift_mask(self, x: Tensor, size: tuple[int, int], shift: list[int]) -> Tensor:
        """Returns `(nW, N, N)`: tokens that a shift has brought together do not attend to each other."""
        wh, ww = self.window_size
        regions = x.new_zeros(size)
        number = 0
        for h in (slice(0, -wh), slice(-wh, -shift[0]), slice(-shift[0], None)):
            for w in (slice(0, -ww), slice(-ww, -shift[1]), slice(-shift[1], None)):
                regions[h, w] = number
                number += 1
        regions = regions.view(size[0] // wh, wh, size[1] // ww, ww).permute(0, 2, 1, 3).reshape(-1, wh * ww)
        apart = regions[:, None] != regions[:, :, None]
        return torch.zeros_like(apart, dtype=x.dtype).masked_fill(apart, -100.0)


class RelativeAttention(nn.Module):
    """torchvision's `RelativePositionalMultiHeadAttention` (MaxViT) with any number of heads of any width.

    Source: Tu et al., MaxViT: Multi-Axis Vision Transformer, ECCV 2022.
    """

    to_qkv: nn.Linear
    merge: nn.Linear
    n_heads: int
    head_dim: int
    max_seq_len: int
    scale_factor: float
    relative_position_index: Tensor
    relative_position_bias_table: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Maps `(B, G, P, D)` to the same shape."""
        qkv = self.to_qkv(x).view(*x.shape[:3], 3, self.n_heads, self.head_dim)
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # (B, G, H, P, D)
        bias = self.relative_position_bias_table[self.relative_position_index.view(-1)]
        bias = bias.view(self.max_seq_len, self.max_seq_len, -1).permute(2, 0, 1)  # (H, P, P)
        attn = (q @ (k * self.scale_factor).transpose(-2, -1) + bias).softmax(-1)
        out: Tensor = self.merge((attn @ v).transpose(2, 3).flatten(3))
        return out


def _become_multihead(module: Any) -> None:
    module.__class__ = MultiheadAttention
    module.scale = module.head_dim**-0.5
    # The fused encoder layer reads the parameters and would not see that heads are gone; this keeps it away.
    module._qkv_same_embed_dim = False


def refresh_multihead(module: Any) -> None:
    """Makes the widths of a multi-head attention's inputs say what its parameters say."""
    if module.in_proj_weight is not None:
        module.embed_dim = module.kdim = module.vdim = module.in_proj_weight.shape[1]
    else:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        module.embed_dim, module.kdim, module.vdim = (int(w.shape[1]) for w in weights if w is not None)


def _become_window(module: Any) -> None:
    module.__class__ = WindowAttention
    module.head_dim = module.qkv.out_features // 3 // module.num_heads
    module.scale = module.head_dim**-0.5


def _become_relative(module: Any) -> None:
    module.__class__ = RelativeAttention


_EQUIVALENTS: dict[str, Callable[[Any], None]] = {
    "torch.nn.modules.activation.MultiheadAttention": _become_multihead,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _become_window,
    "torchvision.models.swin_transformer.ShiftedWindowAttentionV2": _become_window,
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": _become_relative,
}
"""Class → what turns its instance into ours. Subclasses have a forward pass of their own and stay as they are."""


def replaceable(model: nn.Module) -> list[str]:
    """Returns the paths of the modules that `replace_attention` replaces."""
    return [path for path, module in model.named_modules() if _name(module) in _EQUIVALENTS]


def replaced(model: nn.Module) -> list[str]:
    """Returns the paths of the modules that were replaced."""
    ours = (MultiheadAttention, WindowAttention, RelativeAttention)
    return [path for path, module in model.named_modules() if isinstance(module, ours)]


def replace_attention(model: nn.Module) -> nn.Module:
    """Turns the attention modules of `model` into ours, in place; parameters, buffers and their names stay."""
    for module in model.modules():
        become = _EQUIVALENTS.get(_name(module))
        if become is not None:
            become(module)
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
    return model


def prunable(model: nn.Module) -> nn.Module:
    """Returns `model` itself, or a copy with our attention modules where it has some that cannot lose heads, and
    without what earlier passes left on modules with gradients attached.

    The copy has the very parameters and buffers of `model`: what is trained, loaded or moved in one is so in the other.
    """
    if keeps_graph(model):
        model = without_graph(model)
    if not replaceable(model):
        return model
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    shared = [*tables, *(tensor for table in tables for tensor in table.values())]
    return replace_attention(copy.deepcopy(model, {id(part): part for part in shared}))


def _name(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"
