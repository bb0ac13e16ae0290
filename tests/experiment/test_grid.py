"""Runs are refused before they begin, told when they end, and blamed on whose line it was."""

import pytest

from voltana_ctrl import ConfigError, Decision, compare
from voltana_ctrl.experiment.grid import plan_runs
from voltana_ctrl.experiment.remaining import TimeLeft

SHORT = {"duration_s": 5.0, "warmup_s": 0.0, "rates_req_s": [5.0]}


class _Own:
    def __init__(self, fleet, slo):
        self.fleet = fleet

    def init(self):
        return None


class SaysNothing(_Own):
    def decide(self, observation, memory):
        pass


class SaysDecisionAlone(_Own):
    def decide(self, observation, memory):
        return Decision.highest(self.fleet)


class SaysClocks(_Own):
    def decide(self, observation, memory):
        return observation.state.freq_mhz, memory


class SaysTooFew(_Own):
    def decide(self, observation, memory):
        from voltana_ctrl import FleetSpec

        small = FleetSpec.pd(prefill=1, decode=1, profile=self.fleet.instances[0].profile)
        return Decision.highest(small), memory


class Stumbles(_Own):
    def decide(self, observation, memory):
        return observation.state.no_such_thing, memory


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (SaysNothing, r"SaysNothing.decide: expected a pair .*got nothing; end it with"),
        (SaysDecisionAlone, r"got the Decision alone"),
        (SaysClocks, r"got ndarray for the Decision"),
        (SaysTooFew, r"expected a Decision for 4 instances, got one for 2"),
        (Stumbles, r"AttributeError: .*no_such_thing.*test_grid.py, line \d+"),
    ],
)
def test_a_policy_that_returns_the_wrong_thing_is_told_so_in_its_own_terms(policy, words):
    with pytest.raises(ConfigError, match=words):
        compare(**SHORT, policies=[f"{__name__}:{policy.__name__}"])


def test_a_fleet_file_names_its_own_profiles(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(
        '[[instance]]\nrole = "colocated"\nprofile = "a100-sxm-80gb/llama-3.1-8b"\n',
        encoding="utf-8",
    )
    assert plan_runs(fleet=str(path)).profile == "a100-sxm-80gb/llama-3.1-8b"
    with pytest.raises(ConfigError, match="profile: the fleet names the profile"):
        plan_runs(fleet=str(path), profile="h100-sxm-80gb/llama-3.1-8b")


def test_references_run_first_at_each_load_and_every_run_once():
    grid = plan_runs(rates_req_s=[5.0, 9.0], policies=["mpc", "bound", "static-max"], seeds=2)
    begun = [(grid.runs[k].rate_req_s, grid.runs[k].policy) for k in grid.order()]
    assert begun[:6] == [(5.0, "bound")] * 2 + [(5.0, "static-max")] * 2 + [(5.0, "mpc")] * 2
    assert sorted(grid.order()) == list(range(12))


@pytest.mark.parametrize("slower", [0.2, 1.0, 20.0], ids=lambda slower: f"x{slower:g}")
def test_time_left_is_right_within_a_factor_of_two_from_the_first_tenth_on(slower):
    """Whatever the machine, and though most of the time goes to a policy that comes late."""
    grid = plan_runs(policies=["static-max", "voltanallm", "mpc", "bound"], seeds=3)
    asked = {"mpc"}
    left = TimeLeft(grid, asked, 1)
    took_s = {
        k: slower * (2.0 + 0.01 * grid.runs[k].rate_req_s if run.policy == "mpc" else 0.03)
        for k, run in enumerate(grid.runs)
    }
    total_s, now_s = sum(took_s.values()), 0.0
    order = grid.order()
    for index in order:
        # Seen at its end, and half-way before.
        for at_s in (now_s + 0.5 * took_s[index], now_s + 0.9 * took_s[index]):
            if 0.1 * total_s < at_s < 0.95 * total_s:
                assert 0.5 < left.left_s(at_s) / (total_s - at_s) < 2.0
        now_s += took_s[index]
        left.add(_done(index, took_s[index]))
    assert left.left_s(now_s) == 0.0


def _done(index, took_s):
    from voltana_ctrl.experiment import Done

    return Done(index=index, figures={}, took_s=took_s)
