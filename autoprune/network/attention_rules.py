"""Rules of products of activations: matrix products and attention.

Decides which dimensions live and die together and what the products cost. Knows nothing of modules or groups.
"""

from __future__ import annotations

from typing import Any

from autoprune.network.labels import Labels, Value
from autoprune.network.tape import Product, Tape, extent


def matmul(tape: Tape, a: Value, b: Value) -> Value:
    """`(..., M, K) @ (..., K, N) -> (..., M, N)`; the contracted dimensions live and die together."""
    if len(a.shape) < 2 or len(b.shape) < 2:
        raise NotImplementedError
    reason = f"multiplied at {tape.where} with a tensor of fixed width"
    contracted = None
    if a.dims[-1] is not None or b.dims[-2] is not None:
        contracted = tape.align(a.dims[-1], b.dims[-2], reason)
    batch: list[Labels | None] = []
    rank = len(tape.shape) - 2
    for k in range(rank):
        found = [t.dims[k - rank - 2] for t in (a, b) if len(t.shape) - 2 >= rank - k and t.shape[k - rank - 2] > 1]
        merged = found[0] if found else None
        if len(found) == 2 and (merged is not None or found[1] is not None):
            merged = tape.align(merged, found[1], reason)
        batch.append(merged)
    dims = (*batch, a.dims[-2], b.dims[-1])
    sizes = tuple(extent(d, n) for d, n in zip(dims, tape.shape, strict=True))
    tape.products.append(Product(1, (*sizes, extent(contracted, a.shape[-1]))))
    return Value(tape.shape, dims)


def attention(tape: Tape, q: Value, k: Value, v: Value, *_: Any, **__: Any) -> Value:
    """`(..., L, E), (..., S, E), (..., S, V) -> (..., L, V)`.

    The default scale is one over the root of E, so removing query and key channels would change the others' attention.
    """
    for value in (q, k):
        tape.labels.freeze(value.dims[-1], f"the scale of the attention at {tape.where} depends on their number")
    batch: list[Labels | None] = []
    for axis in range(len(q.shape) - 2):
        merged = q.dims[axis]
        for other in (k.dims[axis], v.dims[axis]):
            if merged is not None or other is not None:
                merged = tape.align(merged, other, f"attended at {tape.where} with a tensor of fixed width")
        batch.append(merged)
    sizes = tuple(extent(d, n) for d, n in zip(batch, q.shape[:-2], strict=True))
    for value in (k, v):
        channels = extent(value.dims[-1], value.shape[-1])
        tape.products.append(Product(q.shape[-2] * k.shape[-2], (*sizes, channels)))
    return Value(tape.shape, (*batch, q.dims[-2], v.dims[-1]))
