"""Latency: how time is measured, and the table that predicts it for any widths."""
