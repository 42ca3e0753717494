"""Settings of all tests."""

from __future__ import annotations

from hypothesis import settings

# No deadline: the machine's cores may be shared, and a slow example is no failure.
settings.register_profile("autoprune", deadline=None)
settings.load_profile("autoprune")
