"""Tracing: from a model to a `Network` that was verified, and its cache on disk."""
