"""Budgets of time: a table of measured times, and the correction of what it predicts by the whole model's time."""
