"""A governor that an engine makes by itself is the one that the whole policy would have made."""

import numpy as np
import pytest

from voltana_ctrl import FleetSpec, Slo, load_profile
from voltana_ctrl.engines.governors import governor_of_policy
from voltana_ctrl.policies import PolicySetup, find_policy, list_policies

SLO = Slo(ttft_s=0.6, itl_s=0.06)
#: Their governors learn inside the controller; nothing else can host them.
WITHIN = {"voltanallm-adaptive"}
#: Found by trial runs, which only the simulator has.
TRIED = {"static-best"}


@pytest.mark.parametrize("shape", ["1P1D", "1C"])
@pytest.mark.parametrize(
    "policy",
    [
        *(one.name for one in list_policies() if one.name not in TRIED),
        "pack-1005",
        "mpc+jsq",
        "static-1005",
    ],
)
def test_it_is_that_of_the_policy(policy, shape):
    fleet = FleetSpec.parse(shape, load_profile("a100-sxm-80gb/llama-3.1-8b"))
    setup = PolicySetup(delay_s=0.04, call_s=0.003)
    theirs = find_policy(policy).build(fleet, SLO, setup).governors
    dwell_s = setup.call_s * len(fleet)
    for i, one in enumerate(fleet.instances):
        ours = governor_of_policy(policy, one, SLO, delay_s=0.04, dwell_s=dwell_s)
        if theirs is None or policy in WITHIN:
            assert ours is None
            continue
        assert type(ours) is type(theirs[i])
        assert ours.kernel is theirs[i].kernel
        np.testing.assert_array_equal(ours.params, theirs[i].params)
