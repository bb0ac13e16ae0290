"""Colours, markers and line styles: told apart without colour vision, on light and on dark.

Policies take the colours of Okabe and Ito, "Color Universal Design" (2008), in the order that
keeps neighbours furthest apart; parts of energy take the high-contrast scheme of Paul Tol's
technical note SRON/EPS/TN/09-002 (2021). Markers and dashes say the same once more.
"""

from __future__ import annotations

from dataclasses import dataclass

from voltana_ctrl.report.study import REFERENCE

#: Text, axes and the bound; grid; what is behind everything.
INK, GRID, PAPER = "#1b1f24", "#d8dce1", "#ffffff"
#: An objective that is not met, and the line that says which.
MISS = "#b3261e"

REFERENCE_COLOUR = "#6b7078"
POLICY_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osD^vP"

#: Parts of energy, in the order they are stacked.
PARTS = {"prefill": "#004488", "decode": "#ddaa33", "transfer": "#bb5566", "idle": "#c4c8cd"}

#: What becomes of a colour on a dark page; the others stay.
DARK = {
    INK: "#e8eaed",
    GRID: "#3c4149",
    PAPER: "#15181c",
    MISS: "#ff8a80",
    REFERENCE_COLOUR: "#b9bfc7",
    "#0072b2": "#1f7fc8",
    "#004488": "#6699cc",
    "#ddaa33": "#eecc66",
    "#bb5566": "#ee99aa",
    "#c4c8cd": "#5d636b",
}


@dataclass(frozen=True, slots=True)
class Look:
    """How one policy is drawn, in every figure alike."""

    colour: str
    marker: str
    dashes: str


def looks(policies: tuple[str, ...]) -> dict[str, Look]:
    """Look of each policy: the reference grey, the bound a dashed line without marks."""
    look: dict[str, Look] = {}
    for policy in policies:
        if policy == "bound":
            look[policy] = Look(INK, "", "--")
        elif policy == REFERENCE:
            look[policy] = Look(REFERENCE_COLOUR, "X", "-")
        else:
            taken = sum(one.colour in POLICY_COLOURS for one in look.values())
            turn, k = divmod(taken, len(POLICY_COLOURS))
            # Beyond six the colours come again with other marks and dashes.
            mark = MARKERS[(k + turn) % len(MARKERS)]
            look[policy] = Look(POLICY_COLOURS[k], mark, ("-", "-.", ":")[turn % 3])
    return look
