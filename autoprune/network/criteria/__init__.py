"""Criteria: scores of channels, weights and branches, and error tables."""
