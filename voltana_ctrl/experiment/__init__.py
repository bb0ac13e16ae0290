"""Experiments: one run of a policy on a load, and policies x loads x seeds side by side."""

from voltana_ctrl.experiment.comparison import SCHEMA, Comparison, compare
from voltana_ctrl.experiment.grid import Done, Grid
from voltana_ctrl.experiment.remaining import TimeLeft
from voltana_ctrl.experiment.run import Run
from voltana_ctrl.experiment.store import ResultStore

__all__ = ["SCHEMA", "Comparison", "Done", "Grid", "ResultStore", "Run", "TimeLeft", "compare"]
