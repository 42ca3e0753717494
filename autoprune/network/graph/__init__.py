"""What a traced network is: labels, layers, pruning groups, exact costs. Values and arithmetic on them."""
