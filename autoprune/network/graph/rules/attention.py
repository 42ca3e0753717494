"""Rules of products of activations: matrix products and attention.

Decides which dimensions live and die together and what the products cost. Knows nothing of modules or groups.
"""

from __future__ import annotations

from typing import Any

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.record import Product, Query
from autoprune.network.graph.recorder import Tape, extent


def matmul(tape: Tape, a: Value, b: Value) -> Value:
    """`(..., M, K) @ (..., K, N) -> (..., M, N)`; the contracted dimensions live and die together."""
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise NotImplementedError
    reason = f"multiplied at {tape.where} with a tensor of fixed width"
    contracted = None
    if a.dims[-1] is not None or b.dims[-2] is not None:
        contracted = tape.align(a.dims[-1], b.dims[-2], reason)
        if contracted is not None:
            tape.contracted.append(contracted)
    batch: list[Labels | None] = []
    rank = len(tape.shape) - 2
    # The dimensions in front are aligned at the right: dimension k of the result (*batch, M, N) is k - rank - 2 of a
    # and of b, where they have it; one of size 1 is broadcast and joins nothing.
    for k in range(rank):
        found = [t.dims[k - rank - 2] for t in (a, b) if len(t.shape) - 2 >= rank - k and t.shape[k - rank - 2] > 1]
        merged = found[0] if found else None
        if len(found) == 2 and (merged is not None or found[1] is not None):
            merged = tape.align(merged, found[1], reason)
        batch.append(merged)
    dims = (*batch, a.dims[-2], b.dims[-1])  # (..., M, N); MACs: all of them times K
    sizes = tuple(extent(d, n) for d, n in zip(dims, tape.shape, strict=True))
    tape.products.append(Product(1, (*sizes, extent(contracted, a.shape[-1]))))
    return Value(tape.shape, dims)


def attention(tape: Tape, q: Value, k: Value, v: Value, mask: Value | None = None, *_: Any, **kwargs: Any) -> Value:
    """`(..., L, E), (..., S, E), (..., S, V) -> (..., L, V)`; the keys' and the values' tokens stay.

    The default scale is one over the root of E. Where the parameter that makes the queries is known, surgery takes the
    change of the scale into it; else their width stays.
    """
    if kwargs.get("enable_gqa") or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        raise NotImplementedError
    width = None
    if q.dims[-1] is not None or k.dims[-1] is not None:
        width = tape.align(q.dims[-1], k.dims[-1], f"attended at {tape.where} with a tensor of fixed width")
    if width is not None:
        tape.contracted.append(width)
        if kwargs.get("scale") is None:
            _keep_scale(tape, width)
    batch: list[Labels | None] = []
    rank = len(q.shape)
    # q (*batch, L, E), k (*batch, S, E), v (*batch, S, V): heads are among the batch dimensions and go together. A mask
    # (..., L, S) is aligned at the right, so that axis of q is axis - rank of it.
    for axis in range(rank - 2):
        merged = q.dims[axis]
        others = [k.dims[axis], v.dims[axis]]
        if mask is not None and len(mask.shape) >= rank - axis and mask.shape[axis - rank] > 1:
            others.append(mask.dims[axis - rank])
        for other in others:
            if merged is not None or other is not None:
                merged = tape.align(merged, other, f"attended at {tape.where} with a tensor of fixed width")
        batch.append(merged)
    for value in (q, k, v):
        tape.labels.freeze(value.dims[-2], f"the tokens of the attention at {tape.where}")
    sizes = tuple(extent(d, n) for d, n in zip(batch, q.shape[:-2], strict=True))
    # Two products: q @ kᵀ has batch * L * S * E MACs, weights @ v has batch * L * S * V.
    for value in (k, v):
        channels = extent(value.dims[-1], value.shape[-1])
        tape.products.append(Product(q.shape[-2] * k.shape[-2], (*sizes, channels)))
    return Value(tape.shape, (*batch, q.dims[-2], v.dims[-1]))


def _keep_scale(tape: Tape, width: Labels) -> None:
    if tape.query is None:
        tape.labels.freeze(width, f"the scale of the attention at {tape.where} depends on their number")
        return
    weight, bias, rows = tape.query
    tape.queries.append(Query(weight, bias, rows, width))
