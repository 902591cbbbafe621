"""What every operation does to channels: one function per kind of operation, found by name in the registry."""

from coreprune.graph.rules import compute, elementwise, lookup, movement, norm  # noqa: F401 - before any rule of a user's own
