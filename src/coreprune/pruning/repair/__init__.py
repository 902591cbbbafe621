"""Refit what reads pruned channels, in closed form."""
