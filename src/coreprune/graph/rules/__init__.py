"""What every operation does to channels: one function per kind of operation, found by name in the registry."""
