"""Artifacts: saved, exported and served models."""
