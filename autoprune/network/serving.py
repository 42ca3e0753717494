"""The path of the loader that registered models name: `autoprune.network.artifacts.serving` is what they get.

Stays where it is, for models that were registered before name it too.
"""

from autoprune.network.artifacts.serving import ServedModel, _load_pyfunc

__all__ = ["ServedModel", "_load_pyfunc"]
