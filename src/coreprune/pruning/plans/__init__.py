"""Decide which channels of every group stay, and change the weights accordingly."""
