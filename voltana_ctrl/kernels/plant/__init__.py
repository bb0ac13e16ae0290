"""The simulated fleet, event by event: `advance` is the loop, the others are what it does."""
