"""One HTML page that needs nothing but itself: figures, tables, and the numbers as JSON."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from voltana_ctrl.files import whole_file
from voltana_ctrl.report.figures import Figure, check_plot, drawable, svg
from voltana_ctrl.report.palette import DARK, INK, PARTS, POLICY_COLOURS, REFERENCE_COLOUR
from voltana_ctrl.report.study import REFERENCE, Study, load_text
from voltana_ctrl.report.terminal import text

# Nothing may be fetched, by whatever ends up in a name.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

_STATUS = {
    "measured": "Measured on this GPU with this model.",
    "fitted": "Fitted to published measurements of this GPU with this model.",
    "scaled": "Fitted on a related GPU or model and scaled.",
    "extrapolated": "Extrapolated: at least one coefficient has no measurement behind it."
    " Do not take absolute watts from this page.",
}


def write_html(study: Study, path: str | Path) -> None:
    """Write one self-contained page: figures, tables and every number.

    Parameters
    ----------
    study : Study
        Comparison to show; with details, clocks over time and latencies of every load too.
    path : str or Path
        File to write.

    Raises
    ------
    ConfigError
        If Matplotlib is missing or the file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from voltana_ctrl import compare
    >>> result = compare(rates_req_s=[5.0, 9.0], duration_s=10.0, warmup_s=2.0,
    ...                  policies=["static-max", "bound"])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_html(result.to_study(), Path(folder) / "out.html")
    ...     (Path(folder) / "out.html").read_text()[:15]
    '<!doctype html>'
    """
    check_plot()
    page = render(study)
    with whole_file(path) as beside:
        beside.write_text(page, encoding="utf-8")


def render(study: Study) -> str:
    """Return the page as text."""
    names = " · ".join(escape(study.comparison[k]) for k in ("fleet", "profile", "workload"))
    figures = drawable(study)
    common = "".join(_figure(study, one, None) for one in figures if not one.one_load)
    by_load = "".join(_load(study, rate_req_s, figures) for rate_req_s in study.loads)
    slo = study.comparison["slo"]
    data = json.dumps(dict(study.comparison), allow_nan=False).replace("<", "\\u003c")
    seeds = len(study.seeds)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>voltana-ctrl compare: {names}</title>
<link rel="icon" href="data:,">
<style>
{_colours()}{(files(__package__) / "page.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<header>
<p class="badges"><span class="badge">simulated</span>{_badges(study)}</p>
<h1>Energy and latency of {_count(len(study.policies), "policy", "policies")}</h1>
<p class="lead">{names}</p>
<p>SLO: TTFT within {slo["ttft_s"]:g} s and ITL within {slo["itl_s"] * 1e3:g} ms, each for
{100 * slo["attainment"]:g} % of requests. {_count(len(study.loads), "load")},
{_count(seeds, "seed")}{_judged(study)}. Every number on this
page comes from a simulated fleet; none was
measured on hardware.</p>
{"".join(f"<p>{escape(said)}</p>" for said in (study.delays, study.conditions) if said)}
{"".join(f'<p class="note">{escape(note)}</p>' for note in study.notes)}
{_warnings(study)}
</header>
<main>
<section><h2>Least power that keeps the SLO</h2>
{_CLOSED if None in study.loads else ""}{_cheapest(study)}</section>
{common}{by_load}{_intervals(study)}
<section><h2>Numbers</h2>
<p class="note">Means over seeds. Saving is against {REFERENCE}; gap closed is the way from
voltanallm to the fluid bound. {_MISS} misses the SLO.</p>
{_summary(study)}
<details><summary>Every run, every figure</summary>
{_every_run(study)}</details></section>
</main>
<footer><p>voltana-ctrl {escape(str(study.comparison.get("version", "")))}. Colours of policies:
Okabe and Ito (2008); of energy: Paul Tol's high contrast (2021). The JSON of the comparison
is in this page: <code>#comparison</code>.</p></footer>
<script type="application/json" id="comparison">{data}</script>
</body>
</html>
"""


_CLOSED = (
    '<p class="note">In a closed loop slower policies serve less, so their power does not compare;'
    " the policy with the least energy per token is named.</p>\n"
)
_MISS = '<span class="miss">*</span>'


def _judged(study: Study) -> str:
    return f"; judged: {study.window}" if study.window else ""


def _count(number: int, one: str, several: str | None = None) -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"


# How well it is known


def _badges(study: Study) -> str:
    return "".join(
        f'<span class="badge {profile.status}">{escape(profile.name)}: {profile.status}</span>'
        for profile in study.profiles
    )


def _warnings(study: Study) -> str:
    """One paragraph per profile: how well it is known, and the weakest parts by name."""
    paragraphs = []
    for profile in study.profiles:
        weak = [
            part for part, facts in profile.sources.items() if facts.get("status") == "extrapolated"
        ]
        of = f" Extrapolated: {', '.join(weak)}." if weak else ""
        kind = "warning" if profile.status == "extrapolated" else "note"
        role = ' role="alert"' if kind == "warning" else ""
        paragraphs.append(
            f'<p class="{kind}"{role}><strong>Profile {escape(profile.name)} is'
            f" {profile.status}.</strong> {_STATUS[profile.status]}{escape(of)}"
            f" ({escape(profile.summary)})</p>"
        )
    return "\n".join(paragraphs)


# Figures


def _figure(study: Study, figure: Figure, rate_req_s: float | None) -> str:
    name = figure.name + (f"-{study.loads.index(rate_req_s)}" if figure.one_load else "")
    title = figure.title + (f", {load_text(rate_req_s)}" if figure.one_load else "")
    drawing = _themed(svg(study, figure, rate_req_s), name)
    drawing = drawing.replace(
        "<svg", f'<svg role="img" aria-label="{escape(title)} (simulated)"', 1
    )
    heading = "h3" if figure.one_load else "h2"
    return (
        f'<section><{heading}>{escape(title)}</{heading}>\n<figure id="{name}">{drawing}'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure></section>\n"
    )


def _load(study: Study, rate_req_s: float | None, figures: list[Figure]) -> str:
    drawn = "".join(_figure(study, one, rate_req_s) for one in figures if one.one_load)
    if not drawn:
        return ""
    opened = " open" if rate_req_s == study.shown_load else ""
    return (
        f'<details class="load"{opened}><summary>Over time, and latencies, at'
        f" {load_text(rate_req_s)}</summary>\n{drawn}</details>\n"
    )


def _colours() -> str:
    """Each colour of the figures as a variable, and what it is on a dark page."""
    light = dict.fromkeys([*DARK, INK, REFERENCE_COLOUR, *POLICY_COLOURS, *PARTS.values()])
    rules = "".join(f"--c{one[1:]}:{one};" for one in light)
    dark = "".join(f"--c{one[1:]}:{other};" for one, other in DARK.items())
    return f":root{{{rules}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"


def _themed(drawing: str, name: str) -> str:
    """Colours as variables of the page; ids that no other figure has; no fixed size."""
    drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing, flags=re.DOTALL)
    drawing = re.sub(r'(<svg [^>]*?)width="[^"]*pt"', r"\1", drawing, count=1)
    drawing = re.sub(r'(<svg [^>]*?)height="[^"]*pt"', r"\1", drawing, count=1)
    known = {*DARK, INK, REFERENCE_COLOUR, *POLICY_COLOURS, *PARTS.values()}
    drawing = re.sub(
        r"(fill|stroke): (#[0-9a-f]{6})",
        lambda m: f"{m[1]}: var(--c{m[2][1:]})" if m[2] in known else m[0],
        drawing,
    )
    drawing = re.sub(r'\bid="', f'id="{name}-', drawing)
    return re.sub(r"(url\(|href=\")#", rf"\1#{name}-", drawing)


# Tables


def _table(head: list[str], rows: list[list[str]], kind: str) -> str:
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body, above = "", ""
    for row in rows:
        # A line between loads.
        first = ' class="first"' if row[0] != above else ""
        above = row[0]
        body += f"<tr{first}>{''.join(row)}</tr>\n"
    return (
        f'<div class="scroll"><table id="{kind}"><thead><tr>{top}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(shown: str, value: Any = None, kind: str = "") -> str:
    """Cell that carries its number in full."""
    full = "" if value is None else f' data-value="{escape(json.dumps(value))}"'
    return f"<td{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}{full}>{shown}</td>"


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return _cell(text(None if value is None else value * scale, form), value)


def _cheapest(study: Study) -> str:
    rows = []
    for rate_req_s in study.loads:
        policy = study.cheapest(rate_req_s)
        row = [f'<th scope="row">{load_text(rate_req_s)}</th>']
        if policy is None:
            row += ['<td class="name">no policy keeps it</td>', *["<td>-</td>"] * 4]
        else:
            row += [
                f'<td class="name">{escape(policy)}</td>',
                _number(study.mean(policy, rate_req_s, "mean_power_w"), "{:.0f}"),
                _number(study.saving_frac(policy, rate_req_s), "{:.1f}", 100.0),
                _number(study.mean(policy, rate_req_s, "energy_per_token_j"), "{:.4f}"),
                _number(study.above_bound_frac(policy, rate_req_s), "{:.1f}", 100.0),
            ]
        rows.append(row)
    head = [
        "load", "policy", "power [W]", f"saving against {REFERENCE} [%]", "energy [J/token]",
        "above the bound [%]",
    ]  # fmt: skip
    return _table(head, rows, "cheapest")


_COLUMNS = (
    ("mean_power_w", "power [W]", "{:.0f}", 1.0),
    ("energy_per_token_j", "energy [J/token]", "{:.4f}", 1.0),
    ("wall_power_w", "power at the wall [W]", "{:.0f}", 1.0),
    ("saving_wall_frac", "saving at the wall [%]", "{:.1f}", 100.0),
    ("ttft_attainment", "TTFT met [%]", "{:.2f}", 100.0),
    ("itl_attainment", "ITL met [%]", "{:.2f}", 100.0),
    ("slo_attainment", "both met [%]", "{:.2f}", 100.0),
    ("ttft_p50_s", "TTFT p50 [s]", "{:.3f}", 1.0),
    ("ttft_p99_s", "TTFT p99 [s]", "{:.3f}", 1.0),
    ("itl_p50_s", "ITL p50 [ms]", "{:.1f}", 1e3),
    ("itl_p99_s", "ITL p99 [ms]", "{:.1f}", 1e3),
    ("mean_freq_prefill_mhz", "prefill clock [MHz]", "{:.0f}", 1.0),
    ("mean_freq_decode_mhz", "decode clock [MHz]", "{:.0f}", 1.0),
    ("mean_batch", "batch [req]", "{:.1f}", 1.0),
    ("bound_gap_closed", "gap closed [%]", "{:.0f}", 100.0),
    ("over_budget_frac", "over budget [%]", "{:.2f}", 100.0),
)


def _summary(study: Study) -> str:
    rows = []
    optional = {"over_budget_frac", "wall_power_w", "saving_wall_frac"}
    told = {key for key in optional if any(r.get(key) is not None for r in study.all_runs)}
    columns = [column for column in _COLUMNS if column[0] not in optional - told]
    for rate_req_s in study.loads:
        best = study.cheapest(rate_req_s)
        for policy in study.policies:
            if not study.runs(policy, rate_req_s):
                continue
            misses = study.meets_slo(policy, rate_req_s) is False
            name = escape(policy) + (f" {_MISS}" if misses else "")
            cells = [
                _number(study.mean(policy, rate_req_s, key), form, scale)
                for key, _, form, scale in columns
            ]
            cells.insert(1, _number(study.saving_frac(policy, rate_req_s), "{:.1f}", 100.0))
            kind = "name best" if policy == best else "name"
            head = f'<th scope="row">{load_text(rate_req_s)}</th>'
            rows.append([head, f'<td class="{kind}">{name}</td>', *cells])
    heads = [label for _, label, _, _ in columns]
    return _table(["load", "policy", heads[0], "saving [%]", *heads[1:]], rows, "summary")


def _intervals(study: Study) -> str:
    """Savings over draws of the profiles, where they were asked for; else nothing."""
    found = study.comparison.get("uncertainty") or []
    if not found:
        return ""
    rows = []
    for one in found:
        low, middle, high = (one[f"saving_p{q}_frac"] for q in (5, 50, 95))
        unsure = [
            f"{escape(name)} {frac:.0%}"
            for name, frac in one["below_frac"].items()
            if 0.05 < frac < 0.95
        ]
        rows.append(
            [
                f'<th scope="row">{load_text(one["rate_req_s"])}</th>',
                f'<td class="name">{escape(one["policy"])}</td>',
                *(_number(value, "{:.1f}", 100.0) for value in (middle, low, high)),
                _number(one["kept_frac"], "{:.0f}", 100.0),
                f'<td class="name">{", ".join(unsure)}</td>',
            ]
        )
    head = [
        "load", "policy", "saving, median [%]", "5th percentile [%]", "95th percentile [%]",
        "keeps the SLO [% of draws]", "below others in less than 95 % of draws",
    ]  # fmt: skip
    return (
        "\n<section><h2>If the fleet is what its profiles may be</h2>\n"
        f'<p class="note">{_count(found[0]["draws"], "draw")} of the fleet from the bands of its'
        " profiles; policies believe the profiles. Savings are of energy per output token, within"
        f" the SLO where the policy keeps it, against {REFERENCE}.</p>\n"
        f"{_table(head, rows, 'intervals')}</section>"
    )


def _every_run(study: Study) -> str:
    keys = list(dict.fromkeys(key for run in study.all_runs for key in run))
    rows = [
        [
            _cell(escape(_shown(run.get(key))), run.get(key), "name" if key == "policy" else "")
            for key in keys
        ]
        for run in study.all_runs
    ]
    return _table(keys, rows, "runs")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
