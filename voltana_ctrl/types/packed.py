"""A fleet as arrays for compiled code, one entry per distinct instance."""

from __future__ import annotations

from typing import Any

import numpy as np

from voltana_ctrl.checks import I64
from voltana_ctrl.kernels import layout
from voltana_ctrl.types.fleet import FleetSpec
from voltana_ctrl.types.instance import InstanceSpec


def instance_types(fleet: FleetSpec) -> tuple[Any, I64, I64]:
    """Coefficient table and batch sizes per distinct instance, and each one's type.

    Returns
    -------
    tables : records of PROFILE_DTYPE, shape (n_types, n_clocks)
        Short ladders are filled up with their top row.
    padded : ndarray of int, shape (n_types, largest max_batch + 1)
        Executed batch sizes.
    kind : ndarray of int, shape (n,)
        Row of each instance.
    """
    keys: dict[tuple[int, bytes, int, float], int] = {}
    kind = np.zeros(len(fleet), dtype=np.int64)
    firsts: list[InstanceSpec] = []
    for i, instance in enumerate(fleet.instances):
        key = (
            id(instance.profile),
            instance.clocks_mhz.tobytes(),
            instance.max_batch,
            instance.idle_w,
        )
        if key not in keys:
            keys[key] = len(firsts)
            firsts.append(instance)
        kind[i] = keys[key]
    n_clocks = max(len(instance.clocks_mhz) for instance in firsts)
    n_sizes = max(instance.max_batch for instance in firsts) + 1
    tables = np.zeros((len(firsts), n_clocks), dtype=layout.PROFILE_DTYPE)
    padded = np.zeros((len(firsts), n_sizes), dtype=np.int64)
    for row, instance in enumerate(firsts):
        rows = instance.table
        tables[row, : len(rows)] = rows
        tables[row, len(rows) :] = rows[-1]
        padded[row] = instance.profile.padded_batch(n_sizes - 1)
    return tables, padded, kind
