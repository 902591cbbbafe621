"""Models on the disk."""
