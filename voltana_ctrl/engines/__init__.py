"""Adapters to serving engines: what they tell, and what runs inside them."""
