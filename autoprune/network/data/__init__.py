"""Data: samples, batches, where they come from, and what a task is."""
