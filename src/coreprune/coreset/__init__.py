"""Coresets of a layer's channels, and the certificates that come with them."""
