"""Choosing instances: the compiled router port and the routers of `routing`."""
