"""Tries every classification builder of torchvision: what can be pruned, does it run, is it exact, does it load back?

    python tests/benchmarks/coverage.py [--models GLOB] [--output FILE]

For each model (random weights, randomised BatchNorm statistics): trace, prune every group to about half of the MACs,
run, compare with the masked twin in float32, count MACs with `torch.utils.flop_counter`, save, load, compare. One line
a model, as it comes.
"""

from __future__ import annotations

import argparse
import fnmatch
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from autoprune.errors import AutopruneError
from autoprune.network.artifacts import model_document, save_model, shrink_to
from autoprune.network.complexity import count_macs
from autoprune.network.models import ZOO, build_model, model_names
from autoprune.network.surgery import cut, masked_twin
from autoprune.network.trace import Network, trace
from autoprune.network.verify import relative_error
from autoprune.policy import Group, feasible_widths

SIZES = {"inception_v3": 96, "swin_v2_t": 128, "swin_v2_s": 128, "swin_v2_b": 128}
"""Input sizes in pixels where 64 (224 for transformers with fixed positions) does not do."""
HEADER = "| model | px | groups | frozen | MACs kept | twin | MACs exact | reload | seconds | note |"


def size_of(name: str) -> int:
    """Returns the side of a square input that the model takes."""
    if name.startswith(("vit_", "maxvit")):
        return 224
    return SIZES.get(name, 64)


def enliven(model: nn.Module) -> nn.Module:
    """Gives norms and biases values that a mistake would show in."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def halve(network: Network) -> dict[str, torch.Tensor]:
    """Returns the selection at the common ratio that keeps about half of the MACs."""
    groups = [Group(g.name, g.size, feasible_widths(g.size)) for g in network.groups]
    dense = network.cost_model.dense()["macs"]
    low, high = 0.0, 0.9
    for _ in range(12):
        middle = (low + high) / 2
        cost = network.cost_model.cost("macs", {g.name: g.width(middle) for g in groups})
        low, high = (middle, high) if cost > dense / 2 else (low, middle)
    rng = torch.Generator().manual_seed(1)
    return {
        g.name: torch.randperm(g.size, generator=rng)[: g.width(high)].sort().values.numpy()
        for g in groups
        if g.width(high) < g.size
    }


def attempt(name: str) -> str:
    """Returns the table row of one model."""
    start = time.perf_counter()
    side = size_of(name)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    model = enliven(build_model(name=name))
    try:
        network = trace(model, x)
    except AutopruneError as error:
        spent = time.perf_counter() - start
        return f"| {name} | {side} | – | – | – | – | – | – | {spent:.1f} | {str(error).splitlines()[0]} |"
    selection = halve(network)
    small, twin = cut(network, selection).eval(), masked_twin(network, selection).eval()
    costs = network.cost_model.costs({k: len(v) for k, v in selection.items()})
    with torch.no_grad():
        output = small(x)
        error = relative_error(output, twin(x))
        with tempfile.TemporaryDirectory() as folder:
            document = model_document(network, None, selection, {}, {})
            save_model(Path(folder) / "m", small, document)
            back = shrink_to(build_model(name=name), Path(folder) / "m", document).eval()
        reload = relative_error(back(x), output) < 1e-6
    approximate = any(group.approximate for group in network.groups)
    equal = f"{error:.0e}" + (" (approximate)" if approximate and error > 1e-4 else "")
    kept = costs["macs"] / network.cost_model.dense()["macs"]
    exact = count_macs(small, (x,)) == costs["macs"]
    notes = [*network.notes, *dict.fromkeys(network.broken.values())]
    cells = [name, side, len(network.groups), len(network.frozen), f"{kept:.2f}", equal]
    cells += ["yes" if exact else "NO", "yes" if reload else "NO", f"{time.perf_counter() - start:.1f}"]
    return "| " + " | ".join(map(str, [*cells, "; ".join(notes)[:160]])) + " |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default="*")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = [HEADER, "|---" * 10 + "|"]
    print("\n".join(lines), flush=True)
    for name in model_names():
        if name in ZOO or not fnmatch.fnmatchcase(name, options.models):
            continue
        try:
            lines.append(attempt(name))
        except Exception as error:  # a crash is a row of the table too
            lines.append(
                f"| {name} | {size_of(name)} | CRASH | | | | | | | {type(error).__name__}: {str(error)[:160]} |"
            )
        print(lines[-1], flush=True)
        if options.output:
            options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
