"""Calibration: what layers read and give on a few images, kept as moments and as targets."""
