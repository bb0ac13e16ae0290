"""Choosing clocks: the compiled governor port, the governors, and the loops of `control`."""
