"""What the shell may complete: names of policies, profiles and workloads."""

from __future__ import annotations


def policy_names(incomplete: str) -> list[str]:
    """Lists of policies that go on from what is typed."""
    from voltana_ctrl.policies import list_policies

    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{one.name}" for one in list_policies() if one.name.startswith(last)]


def profile_names(incomplete: str) -> list[str]:
    """Profiles that are shipped."""
    from voltana_ctrl.profiles import list_profiles

    return [name for name in list_profiles() if name.startswith(incomplete)]


def workload_names(incomplete: str) -> list[str]:
    """Generators; the shell itself completes files."""
    from voltana_ctrl.sim.catalog import WORKLOADS

    return [name for name in WORKLOADS if name.startswith(incomplete)]
