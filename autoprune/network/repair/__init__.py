"""Repair: what a pruned network loses and can be given back without training."""
