import sys

import pytest

from voltana_ctrl import ConfigError, FleetSpec, Slo, load_profile
from voltana_ctrl.policies import HEADLINE, ROUTERS, PolicySetup, find_policy, list_policies
from voltana_ctrl.types import PowerBudget

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
FLEET = FleetSpec.parse("2P2D", PROFILE)
SLO = Slo(ttft_s=0.6, itl_s=0.06)


@pytest.mark.parametrize("fleet", [FLEET, FleetSpec.parse("3C", PROFILE)], ids=["pd", "c"])
@pytest.mark.parametrize("policy", list_policies(), ids=lambda policy: policy.name)
def test_every_shipped_policy_can_be_built_and_says_where_it_is_from(policy, fleet):
    if not policy.searched:  # it takes trial runs
        parts = policy.build(fleet, SLO, PolicySetup())
        assert parts.governors is None or len(parts.governors) == len(fleet)
    assert policy.summary
    assert policy.source
    assert find_policy(policy.name) is policy


def test_headline_policies_exist():
    assert [find_policy(name).name for name in HEADLINE] == list(HEADLINE)


def test_every_policy_and_router_is_on_the_docs_page(root):
    page = (root / "docs" / "policies.md").read_text(encoding="utf-8")
    for name in [*(policy.name for policy in list_policies()), *ROUTERS]:
        assert f"`{name}`" in page, name


def test_who_knows_budgets():
    knows = {policy.name for policy in list_policies() if policy.knows_budget}
    assert knows >= {"static-budget", "threshold", "pack"}
    assert find_policy("static-budget+jsq").knows_budget
    assert find_policy("pack-900").knows_budget
    assert not find_policy("static-900").knows_budget


def test_a_static_clock_that_nobody_has_is_refused_with_its_neighbours():
    with pytest.raises(ConfigError, match="choose static-990 or static-1005"):
        find_policy("static-1000").build(FLEET, SLO, PolicySetup())
    with pytest.raises(ConfigError, match="choose static-990 or static-1005"):
        find_policy("static-1000+jsq").build(FLEET, SLO, PolicySetup())
    for mhz in (210, 1005, 1410):
        first = find_policy(f"static-{mhz}").build(FLEET, SLO, PolicySetup()).first
        assert first.freq_mhz.tolist() == [mhz] * len(FLEET)


def test_static_clock_is_read_from_the_name():
    first = find_policy("static-900").build(FLEET, SLO, PolicySetup()).first
    assert (first.freq_mhz == 900.0).all()
    with pytest.raises(ConfigError, match="210 to 1410"):
        find_policy("static-9000").build(FLEET, SLO, PolicySetup())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("voltanalm", "did you mean voltanallm"),
        ("", "no such policy"),
        ("static-", "no such policy"),
        ("static-fast", "no such policy"),
        ("no_such_module_here:Class", "cannot import"),
        ("json:NoSuchClass", "has no class"),
        (":Class", "has no class|cannot import"),
        ("json:", "has no class"),
    ],
)
def test_unknown_policies_are_refused_with_a_hint(name, message):
    with pytest.raises(ConfigError, match=message):
        find_policy(name)


MINE = """
from voltana_ctrl import Decision
class Mine:
    def __init__(self, fleet, slo): self.fleet = fleet
    def init(self): return None
    def decide(self, observation, memory):
        return Decision.highest(self.fleet, t_s=observation.state.t_s), memory
class MyRouter:
    phase = "prefill"
    def __init__(self, fleet, slo): pass
    def route(self, request, state): return 0
    def update(self, decision): pass
class Neither:
    def __init__(self, fleet, slo): pass
class Budgeted(Mine):
    def __init__(self, fleet, slo, *, power_budget=None):
        super().__init__(fleet, slo)
        self.power_budget = power_budget
class NoArguments: pass
"""


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    (tmp_path / "my_own_policies.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_own_policies"
    sys.modules.pop("my_own_policies", None)


def test_a_policy_of_ones_own_is_found_by_module_and_class(my_module):
    assert find_policy(f"{my_module}:Mine").build(FLEET, SLO, PolicySetup()).controller is not None
    assert (
        find_policy(f"{my_module}:MyRouter").build(FLEET, SLO, PolicySetup()).prefill_router
        is not None
    )


def test_a_policy_of_ones_own_gets_the_budget_if_it_asks(my_module):
    budget = PowerBudget.parse("900")
    policy = find_policy(f"{my_module}:Budgeted")
    assert policy.knows_budget
    parts = policy.build(FLEET, SLO, PolicySetup(power_budget=budget))
    assert parts.controller.power_budget is budget
    assert not find_policy(f"{my_module}:Mine").knows_budget


@pytest.mark.parametrize(
    ("name", "message"), [("Neither", "init/decide"), ("NoArguments", "fleet, slo")]
)
def test_a_class_that_is_no_policy_is_refused(my_module, name, message):
    with pytest.raises(ConfigError, match=message):
        find_policy(f"{my_module}:{name}").build(FLEET, SLO, PolicySetup())
