"""Tests: one folder a room of the package; helpers, oracles, contract, house and story besides."""
