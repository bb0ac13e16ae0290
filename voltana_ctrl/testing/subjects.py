"""What the laws of controllers and routers share: the object under test, fleets, a short run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.profiles import load_profile
from voltana_ctrl.sim.workload import Workload
from voltana_ctrl.testing.conformance import Law, LawBroken
from voltana_ctrl.types import FleetSpec, InstanceSpec, Role, Slo

if TYPE_CHECKING:
    from voltana_ctrl.backends import SimBackend

__all__ = ["Subject", "example_fleets", "find_subjects"]

_SMALL = "a100-sxm-80gb/llama-3.1-8b"
_FAST = "h100-sxm-80gb/llama-3.1-8b"
_LARGE = "a100-sxm-80gb/llama-3-70b-tp4"
_PATIENCE_S = 60.0


def example_fleets() -> tuple[FleetSpec, ...]:
    """Fleets that every policy should be tried on.

    Returns
    -------
    tuple of FleetSpec
        Two prefill and three decode instances; the smallest fleet, with tensor parallelism;
        three colocated; a mixed one, in which cards, clocks and limits differ.

    Examples
    --------
    >>> [len(fleet) for fleet in example_fleets()]
    [5, 2, 3, 4]
    """
    small, fast = load_profile(_SMALL), load_profile(_FAST)
    mixed = (
        InstanceSpec(id="p0", role=Role.PREFILL, profile=fast),
        InstanceSpec(id="p1", role=Role.PREFILL, profile=small),
        InstanceSpec(id="d0", role=Role.DECODE, profile=small, max_batch=256),
        InstanceSpec(
            id="d1", role=Role.DECODE, profile=fast, clocks_mhz=fast.clocks_mhz[60:], node="node1"
        ),
    )
    return (
        FleetSpec.parse("2P3D", small),
        FleetSpec.parse("1P1D", load_profile(_LARGE)),
        FleetSpec.parse("3C", small),
        FleetSpec(mixed),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One policy on one fleet, under test.

    Parameters
    ----------
    make : callable (fleet, slo) -> controller or router
        Makes the policy, as in ``compare``.
    fleet : FleetSpec
        Fleet that it is made for.
    slo : Slo
        Promises that it is made for.
    other : FleetSpec
        Another fleet that it can be made for; may be the same.
    examples : int
        Number of inputs drawn per law.
    """

    make: Callable[[FleetSpec, Slo], Any]
    fleet: FleetSpec
    slo: Slo
    other: FleetSpec
    examples: int

    def new(self) -> Any:
        """Make a fresh policy for the fleet and the promises."""
        return self.make(self.fleet, self.slo)


def _when_made(law: Law, subject: Subject) -> None:
    with law.watching("make(fleet, slo)", fleet=subject.fleet.ids):
        subject.new()


def find_subjects(
    about: str,
    make: Callable[[FleetSpec, Slo], Any],
    fleets: Sequence[FleetSpec] | None,
    slo: Slo,
    examples: int,
) -> list[Subject]:
    """Subjects for the fleets that `make` accepts; it may refuse others with a ConfigError.

    Parameters
    ----------
    about : str
        ``controller`` or ``router``, for messages.
    make, fleets, slo, examples
        See :func:`~voltana_ctrl.testing.check_controller`.

    Returns
    -------
    list of Subject
        One per fleet that is accepted; `other` of each is that of its neighbour.

    Raises
    ------
    LawBroken
        If it accepts none, or fails in another way.
    """
    law = Law(
        about=about,
        name="made",
        says="It is made from (fleet, slo); what it cannot serve it refuses with a ConfigError.",
        mend="take (fleet, slo), and raise ConfigError for fleets that do not fit",
        check=_when_made,
    )
    accepted: list[Subject] = []
    refused = ""
    for fleet in example_fleets() if fleets is None else fleets:
        subject = Subject(make=make, fleet=fleet, slo=slo, other=fleet, examples=examples)
        try:
            law.check(law, subject)
        except LawBroken as broken:
            if not isinstance(broken.__cause__, ConfigError):
                raise
            refused = f"; the last refusal: {broken.__cause__}"
            continue
        accepted.append(subject)
    law.require(accepted, f"every fleet was refused{refused}")
    return [replace(one, other=accepted[i - 1].fleet) for i, one in enumerate(accepted)]


def run_laws(laws: Sequence[Law], subjects: Sequence[Subject]) -> None:
    """Hold every subject against every law; the first one broken is raised."""
    for law in laws:
        for subject in subjects:
            try:
                law.check(law, subject)
            except LawBroken as broken:
                broken.add_note(f"on a fleet of {', '.join(subject.fleet.ids)}")
                raise


def short_run(fleet: FleetSpec, **plant_options: Any) -> SimBackend:
    """Simulated backend with a dozen requests, long and short, within a second."""
    from voltana_ctrl.backends import SimBackend  # loads Numba

    n = 12
    workload = Workload(
        name="short",
        arrival_s=np.linspace(0.0, 1.0, n),
        prompt_tok=np.array([64, 700, 2500] * (n // 3)),
        output_tok=np.array([5, 40, 12, 1] * (n // 4)),
        duration_s=1.0,
        source="made for checks",
    )
    return SimBackend(fleet, workload=workload, **plant_options)


def require_all_served(law: Law, backend: SimBackend, go: Callable[[float], Iterable[int]]) -> None:
    """Run with `go`, which tells who finished, until everybody has; each finishes once."""
    wanted = len(backend.plant.workload)
    done: list[int] = []
    until_s = 0.0
    while len(set(done)) < wanted and until_s < _PATIENCE_S:
        until_s += 1.0
        done.extend(go(until_s))
    law.require(
        len(set(done)) == wanted,
        f"after {until_s:g} simulated seconds {wanted - len(set(done))} of {wanted} requests"
        " are not served",
        fleet=backend.spec.ids,
    )
    law.require(len(done) == wanted, "a request finished twice", finished=sorted(done))
