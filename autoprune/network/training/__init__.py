"""Training: recipe, schedule, regularisation, and scores on a split."""
