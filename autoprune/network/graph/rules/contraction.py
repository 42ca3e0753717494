"""Rules of products written by hand: einsum, matmul, mm, addmm, mv, dot and their kin, with or without a parameter.

Decides which letters of a product live and die together, what it costs, and when it is a layer: one factor is a
parameter, perhaps transposed, that consumes one dimension and produces another. Knows nothing of modules or groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.record import Layer, Product
from autoprune.network.graph.recorder import Tape, extent
from autoprune.network.graph.rules.attention import matmul as _matmul
from autoprune.network.graph.rules.elementwise import elementwise


def matmul(tape: Tape, a: Value, b: Value) -> Value:
    """`(..., M, K) @ (..., K, N)`; vectors are products too, and a parameter on either side is a layer."""
    left, right = len(a.shape), len(b.shape)
    if left >= 2 and right >= 2:
        if right == 2 and _owner(tape, b) is not None:
            # (B, T, K) @ (K, N) is "bck,kn->bcn": letters from b on for all that is in front
            lead = "".join(chr(ord("b") + k) for k in range(left - 1))
            return _product(tape, f"{lead}k,kn->{lead}n", (a, b))
        if left == 2 and right == 2 and _owner(tape, a) is not None:
            return _product(tape, "mk,kn->mn", (a, b))
        return _matmul(tape, a, b)
    # A product with a vector is counted by nobody (`aten.mv`, `aten.dot`): neither do we, so that counts agree.
    lead = "".join(chr(ord("b") + k) for k in range(left - 1))
    if right == 1:  # (..., K) @ (K,) → (...)
        return _product(tape, f"{lead}k,k->{lead}", (a, b), counted=False)
    if right == 2:  # (K,) @ (K, N) → (N,)
        return _product(tape, "k,kn->n", (a, b), counted=False)
    raise NotImplementedError


def addmm(tape: Tape, bias: Value, a: Value, b: Value, *_: Any, **__: Any) -> Value:
    """`bias + a @ b`, batched or not."""
    product = matmul(tape, a, b)
    if len(product.shape) != len(tape.shape):
        raise NotImplementedError
    return elementwise(tape, bias, product)


def einsum(tape: Tape, equation: str, tensors: Sequence[Value], *_: Any, **__: Any) -> Value:
    """One or two tensors, letters as NumPy has them; more tensors are frozen (their order of products is not told)."""
    if not isinstance(equation, str) or len(tensors) > 2:
        raise NotImplementedError
    return _product(tape, _spell_out(equation, [len(t.shape) for t in tensors]), tensors)


def _spell_out(equation: str, ranks: Sequence[int]) -> str:
    """Returns the equation with an explicit result and letters in place of an ellipsis."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != len(ranks):
        raise NotImplementedError
    spare = [c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in equation]
    # "...ij" of rank 4 stands for two dimensions; terms with fewer are aligned at the right, as broadcasting has it.
    missing = max(r - len(t.replace("...", "")) for t, r in zip(terms, ranks, strict=True))
    filled = []
    for term, rank in zip(terms, ranks, strict=True):
        count = rank - len(term.replace("...", ""))
        if ("..." not in term and count) or count < 0 or missing > len(spare):
            raise NotImplementedError
        filled.append(term.replace("...", "".join(spare[missing - count : missing])))
    if not arrow:
        # as NumPy: the letters that occur once, in alphabetical order, behind the ellipsis
        everything = "".join(terms).replace("...", "")
        once = "".join(sorted(c for c in set(everything) if everything.count(c) == 1))
        output = ("..." if "..." in inputs else "") + once
    return f"{','.join(filled)}->{output.replace('...', ''.join(spare[:missing]))}"


def _product(tape: Tape, equation: str, tensors: Sequence[Value], *, counted: bool = True) -> Value:
    """Writes down one product whose `equation` is explicit and has one letter a dimension."""
    inputs, _, output = equation.partition("->")
    terms = inputs.split(",")
    if any(len(set(term)) < len(term) for term in (*terms, output)):
        raise NotImplementedError  # a diagonal
    if len(terms) == 2:
        a, b = tensors
        # Zeros take the labels of the dimension that they meet in the other tensor.
        for letter in set(terms[0]) & set(terms[1]):
            i, k = terms[0].index(letter), terms[1].index(letter)
            a, b = tape.met(a, i, b.dims[k]), tape.met(b, k, a.dims[i])
        tensors = (a, b)
    labels: dict[str, Labels | None] = {}
    sizes: dict[str, int] = {}
    for term, tensor in zip(terms, tensors, strict=True):
        # One letter a dimension: its labels are those of the first tensor that has it, joined with the second's.
        for letter, dim, size in zip(term, tensor.dims, tensor.shape, strict=True):
            if sizes.get(letter, 1) == 1:
                labels[letter], sizes[letter] = dim, size
            elif size > 1 and (labels[letter] is not None or dim is not None):
                reason = f"multiplied at {tape.where} with a tensor of fixed width"
                labels[letter] = tape.align(labels[letter], dim, reason)
    # "bck,kn->bcn": k is summed and shared; in "bck->b", c and k are summed over and not shared.
    summed = [letter for letter in sizes if letter not in output]
    shared = [letter for letter in summed if len(terms) == 2 and all(letter in term for term in terms)]
    for letter in summed:
        if letter not in shared:
            tape.labels.freeze(labels[letter], f"reduced over channels at {tape.where}")
    if shared:
        # MACs: one for each element of the result and each of what is summed over
        dims = [extent(labels[letter], sizes[letter]) for letter in (*output, *shared)]
        tape.products.append(Product(1 if counted else 0, tuple(dims)))
        _layer(tape, terms, tensors, (output, shared), labels)
    return Value(tape.shape, tuple(labels[letter] if sizes[letter] > 1 else None for letter in output))


def _layer(
    tape: Tape,
    terms: Sequence[str],
    tensors: Sequence[Value],
    letters: tuple[str, Sequence[str]],
    labels: dict[str, Labels | None],
) -> None:
    """Writes a layer down where one factor is a parameter that sums over one dimension and makes another."""
    output, shared = letters
    for own, other in ((1, 0), (0, 1)):
        made = [letter for letter in terms[own] if letter in output and letter not in terms[other]]
        owner = _owner(tape, tensors[own])
        if owner is None or len(made) != 1 or len(shared) != 1 or len(terms[own]) != 2:
            continue
        outputs, inputs = labels[made[0]], labels[shared[0]]
        if outputs is None:
            outputs = tape.fixed(1, "a single output")
        name, order = owner
        # letter → dimension of the parameter as it is stored: (N, K) used as (K, N) has the order (1, 0)
        places = {letter: order[k] for k, letter in enumerate(terms[own])}
        tape.layers.append(
            Layer(
                kind="product",
                weight=name,
                bias=None,
                inputs=inputs,
                outputs=outputs,
                in_dim=None if inputs is None else places[shared[0]],
                out_dim=places[made[0]],
                out_shape=tape.shape,
                node=tape.node,
                product=len(tape.products) - 1,
                normalised=tape.normalised,
            )
        )
        return


def _owner(tape: Tape, value: Value) -> tuple[str, tuple[int, ...]] | None:
    """Returns the matrix parameter that a two-dimensional value is, and its dimensions in the value's order."""
    if len(value.shape) != 2:
        return None
    if value.name is not None:
        return value.name, (0, 1)
    if all(dim is None for dim in value.dims):
        return None
    # It was computed from a parameter (transposed, cast): the labels that it still carries say which, and which way.
    for order in ((1, 0), (0, 1)):
        for name, dims in tape.stored.items():
            if len(dims) == 2 and all(
                (own is None) == (dims[k] is None) and (own is None or _equal(own, dims[k]))
                for own, k in zip(value.dims, order, strict=True)
            ):
                return name, order
    return None


def _equal(a: Labels, b: Labels | None) -> bool:
    return b is not None and a.shape == b.shape and bool((a == b).all())
