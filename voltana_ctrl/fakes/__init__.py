"""Doubles of hardware, for tests and rehearsals."""
