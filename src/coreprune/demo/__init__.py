"""The demo of the command line: train a small network, prune it in eight ways, and report the results."""
