"""coreprune."""
