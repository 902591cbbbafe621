"""Which channels of which parameters leave together, what they cost, and their removal. No numerics of ours."""
