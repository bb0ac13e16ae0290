"""Engines without a model: they serve, and take the time and the energy that a profile says.

Each is a process that speaks the OpenAI API, shows vLLM's metrics page, publishes forward-pass
metrics and hosts the real governor; its GPU is one of the fake driver library, whose clock decides
how long an iteration takes. Nothing else is faked.
"""
