"""The demonstration of the command line: a small network, trained, pruned in eight ways, and reported."""
