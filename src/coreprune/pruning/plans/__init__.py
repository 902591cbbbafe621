"""Which channels of every group stay, and what that does to the weights."""
