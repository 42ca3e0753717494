"""Traces a model once: `torch.export`, one pass of label rules over the graph, groups, index map and exact cost model.

Decides how a module becomes a `Network`. Everything after that is arithmetic on it: the traced result is a plain value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from autoprune.errors import TraceError
from autoprune.network.graph.assembly import assemble
from autoprune.network.graph.copies import runs_channels_last, sharing_copy
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.graph.record import Product
from autoprune.network.surgery.attention import prunable
from autoprune.network.surgery.hooked_weights import check_hooks
from autoprune.network.surgery.masks import mask_assembly
from autoprune.network.tracing.checked_widths import with_checked_widths, with_checks_of_single_groups
from autoprune.network.tracing.computed_sizes import with_told_sizes
from autoprune.network.tracing.counting import count_macs
from autoprune.network.tracing.program import export_program, lays_out_itself, training_program, unread
from autoprune.network.tracing.verify import verified, verified_in_training
from autoprune.network.tracing.walk import walk
from autoprune.policy import CHANNEL


def trace(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, verify: bool = True, pruning: str = CHANNEL
) -> Network:
    """Finds what can be pruned in `model`, and what every choice costs.

    Args:
        model: Any module that `torch.export` accepts. It is not changed.
        example_inputs: One tensor `(B, ...)`, or the tuple of positional inputs. Their values do not matter.
        verify: Prune each group on a copy, run it, and compare it with its masked twin; a group that fails is frozen.
            Masks change no shape and need none of that.
        pruning: What is pruned: `channel`, or single weights: `unstructured`, `2:4`.

    Raises:
        TraceError: The model cannot be exported (the message names the operator), or nothing in it can be pruned.
        InputError: `pruning` is unknown.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not isinstance(inputs[0], Tensor) or inputs[0].ndim < 1:
        raise TraceError("example_inputs must hold at least one tensor with a batch dimension")
    check_hooks(model)
    model = prunable(model)
    with evaluating(model):
        program = export_program(sharing_copy(model), inputs)
        training = training_program(model, inputs, program)
        record, unknown = walk(program, model, inputs[0].shape[0], training=training)
    notes = _notes(unknown) if pruning == CHANNEL else ()  # masks change no shape: an operator needs no rule for them
    network = Network(model, inputs, record, assemble(record, {}), {}, notes)
    if lays_out_itself(program.graph):
        network = replace(network, channels_last=runs_channels_last(model, inputs))
    if verify and pruning == CHANNEL and network.groups:
        network = _verified(network, ruled=not unknown)
        if unread(program, model):
            network = verified_in_training(network)
    else:
        network = _with_uncounted(network)
    if pruning != CHANNEL:
        assembly = mask_assembly(network.record, network.cost_model.dense(), pruning)
        network = replace(network, assembly=assembly, pruning=pruning)
    if not network.groups:
        reasons = "\n".join(f"  {f.name} ({f.size}): {f.reason}" for f in network.frozen[:10])
        raise TraceError(
            f"nothing in {type(model).__name__} can be pruned:\n{reasons or '  it has no layer with channels'}"
        )
    return network


def _verified(network: Network, *, ruled: bool) -> Network:
    """Verifies a network, whose operators all have a rule where it is `ruled`: then pruned copies tell whether MACs are
    those that are predicted, and the dense network is counted only where they are not.
    """
    if ruled:
        found = _freed(network)
        if not found.broken:
            return found
    whole = _with_uncounted(network)
    return found if ruled and whole is network else _freed(whole)


def _freed(network: Network) -> Network:
    """Verifies a network, with attributes following and sizes told where that lets pruned copies run."""
    return with_checks_of_single_groups(with_told_sizes(verified(network, heal=with_checked_widths)))


def _with_uncounted(network: Network) -> Network:
    """Adds the MACs of operators without a rule as a constant: what they read is frozen, so their cost stays."""
    rest = count_macs(network.model, network.example_inputs) - network.cost_model.dense()["macs"]
    if rest <= 0:
        return network
    product = Product(rest * network.record.batch, ())
    note = f"{rest:,} MACs are spent in operators without a rule; they stay whatever is pruned"
    record = replace(network.record, products=(*network.record.products, product))
    return replace(network, record=record, assembly=assemble(record, {}), notes=(*network.notes, note))


def _notes(unknown: Sequence[str]) -> tuple[str, ...]:
    return tuple(f"no rule for the operator {name}: what it reads is frozen" for name in dict.fromkeys(unknown))
