"""Proof of savings: alternating blocks of policy and highest clock, and what they show."""
