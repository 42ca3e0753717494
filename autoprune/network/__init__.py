"""Everything that touches torch: tracing, surgery, criteria, compensation, training, evaluation, export.

Decides what a policy does to a network. Sole owner of torch and torchvision; must not know of Optuna, MLflow or
reports.
"""

from autoprune.network.artifacts.saved import load
from autoprune.network.graph.network import Network
from autoprune.network.pruning import prune
from autoprune.network.tracing.trace import trace

__all__ = ["Network", "load", "prune", "trace"]
