"""What LSTM, GRU and RNN do to channel labels.

Decides which hidden units of a recurrent module are one channel. PyTorch's modules have one `hidden_size` for all
layers and both directions, so the same position of each of them lives or dies together, in every gate. Knows nothing of
other operators.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoprune.network.graph.labels import Labels, Value
from autoprune.network.graph.record import Layer, Product
from autoprune.network.graph.recorder import Rule, Tape

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one call of a recurrent operator."""

    gates: int
    weights: tuple[Value, ...]
    biased: bool
    layers: int
    directions: int
    batch_first: bool

    @property
    def projected(self) -> bool:
        """Whether each layer has a `weight_hr`."""
        return len(self.weights) // (self.layers * self.directions) == (5 if self.biased else 3)

    def of(self, cell: int) -> tuple[Value, ...]:
        """Returns `weight_ih, weight_hh, (bias_ih, bias_hh,) (weight_hr)` of one layer and direction."""
        size = len(self.weights) // (self.layers * self.directions)
        return self.weights[cell * size : (cell + 1) * size]


def _rule(name: str) -> Rule:
    def rule(tape: Tape, x: Value, state: Any, weights: Sequence[Value], *rest: Any, **_: Any) -> tuple[Value, ...]:
        if not isinstance(weights, (list, tuple)) or len(rest) < 6:
            raise NotImplementedError  # the form for packed sequences
        biased, layers, _dropout, _train, bidirectional, batch_first = rest[:6]
        call = _Call(
            _GATES[name], tuple(weights), bool(biased), int(layers), 2 if bidirectional else 1, bool(batch_first)
        )
        return _recurrent(tape, x, state, call)

    return rule


def _recurrent(tape: Tape, x: Value, state: Any, call: _Call) -> tuple[Value, ...]:
    """`(B, T, K)` or `(T, B, K)` → the same with `directions * hidden` channels, and the last states."""
    first = call.of(0)
    hidden_size = first[0].shape[0] // call.gates
    hidden = tape.labels.fresh(hidden_size)
    shown = tape.labels.fresh(first[-1].shape[0]) if call.projected else hidden
    for values, labels in zip(state if isinstance(state, (list, tuple)) else (state,), (shown, hidden), strict=False):
        _start(tape, values, labels)
    steps = int(np.prod(x.shape[:-1]))
    inputs: Labels | None = x.dims[-1]
    for layer in range(call.layers):
        for direction in range(call.directions):
            _cell(tape, call, call.of(layer * call.directions + direction), (inputs, hidden, shown), steps)
        inputs = np.tile(shown, call.directions)
    output = Value(tape.shapes[0], (*x.dims[:-1], inputs))
    before = (None,) * (len(tape.shapes[1]) - 1)
    last = [Value(tape.shapes[1], (*before, shown))]
    if call.gates == 4:
        last.append(Value(tape.shapes[2], (*before, hidden)))
    return (output, *last)


def _start(tape: Tape, state: Any, labels: Labels) -> None:
    """Joins the units of an initial state `(layers, B, H)` or `(B, H)` with the hidden units that start from it.

    Zeros follow; a state that is the model's input, or else of a fixed width, keeps the units.
    """
    if not isinstance(state, Value):
        return
    *others, own = state.dims
    for layers in others:
        tape.labels.freeze(layers, f"it is the number of layers of {tape.where}, or the batch")
    if own is not None:
        tape.labels.join(own, labels)
    elif not tape.fill(state, len(others), labels):
        tape.labels.freeze(labels, f"the initial state of {tape.where} is given from outside")


def _cell_rule(name: str) -> Rule:
    """Returns the rule of one step: `(B, K)` and the state `(B, H)` give the next state."""

    def rule(
        tape: Tape, x: Value, state: Any, w_ih: Value, w_hh: Value, *biases: Value | None, **_: Any
    ) -> Value | tuple[Value, ...]:
        weights = (w_ih, w_hh, *(b for b in biases if b is not None))
        call = _Call(_GATES[name], weights, len(weights) == 4, 1, 1, False)
        hidden = w_hh.dims[1] if w_hh.dims[1] is not None else tape.labels.fresh(w_hh.shape[1])
        states = state if isinstance(state, (list, tuple)) else (state,)
        for values in states:
            _start(tape, values, hidden)
        _cell(tape, call, weights, (x.dims[-1], hidden, hidden), int(np.prod(x.shape[:-1])))
        found = tuple(Value(shape, (*(None,) * (len(shape) - 1), hidden)) for shape in tape.shapes)
        return found if len(found) > 1 else found[0]

    return rule


def _cell(
    tape: Tape, call: _Call, weights: Sequence[Value], labels: tuple[Labels | None, Labels, Labels], steps: int
) -> None:
    """Joins the weights of one layer and direction, and writes down its layers and products."""
    inputs, hidden, shown = labels
    gates = np.tile(hidden, call.gates)
    w_ih, w_hh = weights[0], weights[1]
    for value in weights[: 4 if call.biased else 2]:
        if value.dims[0] is not None:
            tape.labels.join(value.dims[0], gates)
    if w_ih.dims[1] is not None:
        tape.align(w_ih.dims[1], inputs, f"{tape.where} reads the model's input or a tensor of fixed width")
    if w_hh.dims[1] is not None:
        tape.labels.join(w_hh.dims[1], shown)
    own_inputs = w_ih.dims[1] if w_ih.dims[1] is not None else w_ih.shape[1]
    tape.products.append(Product(steps, (gates, own_inputs)))
    _layer(tape, w_ih, w_ih.dims[1], gates, weights[2] if call.biased else None)
    tape.products.append(Product(steps, (gates, shown)))
    _layer(tape, w_hh, shown, gates, weights[3] if call.biased else None)
    if call.projected:
        w_hr = weights[-1]
        for labels_of, wanted in zip(w_hr.dims, (shown, hidden), strict=True):
            if labels_of is not None:
                tape.labels.join(labels_of, wanted)
        tape.products.append(Product(steps, (shown, hidden)))
        _layer(tape, w_hr, hidden, shown, None)


def _layer(tape: Tape, weight: Value, inputs: Labels | None, outputs: Labels, bias: Value | None) -> None:
    if weight.name is None:
        for labels in (inputs, outputs):
            tape.labels.freeze(labels, f"the weight of {tape.where} is computed, not stored")
        return
    tape.layers.append(
        Layer(
            kind="recurrent",
            weight=weight.name,
            bias=None if bias is None else bias.name,
            inputs=inputs,
            outputs=outputs,
            in_dim=1 if inputs is not None else None,
            out_dim=0,
            out_shape=tape.shapes[0],
            node=tape.node,
            product=len(tape.products) - 1,
        )
    )


RECURRENT_RULES: dict[str, Callable[..., Any]] = {
    **{name: _rule(name) for name in _GATES},
    **{f"{name}_cell": _cell_rule(name) for name in _GATES},
}
