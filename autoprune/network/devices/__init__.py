"""Devices: number formats, captured steps and failures."""
