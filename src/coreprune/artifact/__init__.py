"""Saved models: a folder with weights, plan and report, and no pickle."""
