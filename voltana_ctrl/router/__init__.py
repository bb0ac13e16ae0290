"""The router: an OpenAI-compatible proxy in front of the engines of a fleet."""
