"""A router that obeys a controller, and one that has lost it."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.fake_gpus import fleet, seconds_until

pytest.importorskip("starlette", reason="needs the server extra")

from voltana_ctrl import Decision, FleetState, Request
from voltana_ctrl.engines.traffic import Traffic
from voltana_ctrl.live.hub import HubBackend
from voltana_ctrl.live.hub_app import hub_app
from voltana_ctrl.live.link import ControllerLink
from voltana_ctrl.live.subscription import SubscribedRouters, Subscription
from voltana_ctrl.router.ledger import InFlight
from voltana_ctrl.serving.server import ServerThread

TOKEN = "0123456789abcdef-token"
SHAPE = "2P2D"


def parked(spec, *asleep):
    active = np.array([i not in asleep for i in range(len(spec))])
    share = np.zeros(len(spec))
    for members in (spec.prefill, spec.decode):
        share[members] = active[members] / active[members].sum()
    return replace(Decision.highest(spec), active=active, route_frac=share)


@pytest.mark.parametrize("policy", ["mpc", "voltanallm", "static-max+random/round-robin"])
def test_a_parked_instance_gets_nothing_while_another_lives(policy):
    spec = fleet(SHAPE)
    routers = SubscribedRouters(spec, policy)
    routers.update(parked(spec, 0, 3))
    request, state = Request(prompt_tok=300), FleetState.idle(4)
    assert {routers.prefill(request, state) for _ in range(20)} == {1}
    assert {routers.route(request, state) for _ in range(20)} == {2}
    # The other one has died: better the parked one than none.
    dead = replace(state, alive=np.array([True, True, False, True]))
    assert routers.route(request, dead) == 3


def test_without_a_word_it_routes_by_load_and_never_to_who_is_asleep():
    clock = [0.0]
    spec = fleet("1P3D")
    routers = SubscribedRouters(spec, "mpc", now_s=lambda: clock[0])
    routers.update(parked(spec, 1))
    routers.rest([3])
    state = replace(FleetState.idle(4), running_req=np.array([0.0, 2.0, 9.0, 0.0]))
    assert routers.route(Request(prompt_tok=300), state) == 2
    clock[0] = 1.1
    assert routers.alone
    assert routers.route(Request(prompt_tok=300), state) == 1


def test_a_router_that_is_refused_says_why_and_not_that_there_is_no_controller_yet():
    spec, said = fleet(SHAPE), []
    routers, traffic = SubscribedRouters(spec, "mpc"), Traffic(4)
    with ServerThread(hub_app(HubBackend(spec), TOKEN), what="controller") as server:
        link = ControllerLink(
            f"http://127.0.0.1:{server.port}", TOKEN[::-1], spec, "r0", spec.ids, kind="router"
        )
        counts = InFlight(spec, traffic=traffic)
        with link, Subscription(link, routers, counts, traffic, say=said.append):
            seconds_until(lambda: said)
            assert said[0].startswith("router: no controller (controller: status 401")
    assert len(said) == 1


def test_requests_reach_the_controller_and_its_decision_the_routing():
    spec, said = fleet(SHAPE), []
    hub = HubBackend(spec)
    routers = SubscribedRouters(spec, "cascade")
    traffic = Traffic(4)
    counts = InFlight(spec, traffic=traffic)
    with ServerThread(hub_app(hub, TOKEN), what="controller") as server:
        link = ControllerLink(
            f"http://127.0.0.1:{server.port}", TOKEN, spec, "r0", spec.ids, kind="router"
        )
        with link, Subscription(link, routers, counts, traffic, say=said.append) as subscription:
            flight = counts.begin("a", prompt_tok=100)
            counts.enter_prefill(flight, 0)
            counts.leave_prefill(flight)
            counts.enter_decode(flight, 2)
            counts.token(flight, 3)
            seconds_until(hub.routed)
            state = hub.read().state
            assert state.running_req.tolist() == [0.0, 0.0, 1.0, 0.0]
            assert state.arrived_req.tolist() == [1.0, 0.0, 1.0, 0.0]
            assert routers.alone
            counts.ended_well(flight)
            counts.end(flight)

            def deciding(condition):
                """Wait while the controller decides, which it does often enough."""

                def decide():
                    hub.apply(parked(spec, 3))
                    return condition()

                seconds_until(decide, 60.0)

            deciding(lambda: not routers.alone and routers.policy == "mpc")  # the controller's
            finished = []
            deciding(lambda: finished.extend(hub.read().finished.output_tok) or finished)
            assert finished == [3.0]
            picked = set()
            deciding(
                lambda: (
                    picked.add(routers.route(Request(prompt_tok=9), counts.state()))
                    or not routers.alone
                )
            )
            assert picked == {2}
            assert len(subscription.state) == 4
            seconds_until(lambda: routers.alone)
            seconds_until(lambda: "no controller" in said[-1])
    assert "router: requests go where the controller says" in said
