"""Experiments: one run of a policy on a load, and policies x loads x seeds side by side."""

from voltana_ctrl.experiment.comparison import SCHEMA, Comparison, compare
from voltana_ctrl.experiment.run import Run

__all__ = ["SCHEMA", "Comparison", "Run", "compare"]
