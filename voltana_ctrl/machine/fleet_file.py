"""A fleet file of what stands on this machine, and what of it could not be found."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from voltana_ctrl.machine.engines import FoundEngine
from voltana_ctrl.profiles import list_profiles, load_profile

__all__ = ["FleetDraft", "draft_fleet"]

DEFAULT = "a100-sxm-80gb/llama-3.1-8b"


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetDraft:
    """Text of a fleet file.

    Parameters
    ----------
    text : str
        TOML, as :func:`~voltana_ctrl.engines.load_endpoints` reads it.
    doubts : tuple of str
        What could not be found, or was taken for want of better; stands in the text, too.

    Examples
    --------
    >>> FleetDraft(text="", doubts=("no engine was found",)).doubts
    ('no engine was found',)
    """

    text: str
    doubts: tuple[str, ...]


def draft_fleet(
    engines: Sequence[FoundEngine],
    gpu_names: Mapping[str, str],
    held: Mapping[int, Sequence[str]],
    *,
    node: str,
    schema: str | None = None,
) -> FleetDraft:
    """Write down engines with their roles, GPUs and profiles.

    Parameters
    ----------
    engines : sequence of FoundEngine
        Engines that answer.
    gpu_names : mapping of str to str
        Names of the GPUs by UUID.
    held : mapping of int to sequence of str
        UUIDs by the number of the process that computes on them.
    node : str
        Name of this machine.
    schema : str, optional
        Path or address of the file's JSON Schema, for editors.

    Returns
    -------
    FleetDraft
        Text of the file, and what in it is to be looked at.

    Examples
    --------
    >>> from voltana_ctrl.machine import FoundEngine
    >>> engine = FoundEngine(url="http://127.0.0.1:8000", kind="vllm", told={}, role="decode",
    ...                      model="meta-llama/Llama-3.1-8B-Instruct")
    >>> draft = draft_fleet([engine], {"GPU-1": "NVIDIA A100-SXM4-80GB"}, {}, node="n0")
    >>> 'profile = "a100-sxm-80gb/llama-3.1-8b"' in draft.text
    True
    >>> draft.doubts
    ('decode-0: its GPUs could not be told; as the only engine it is given all of them',)
    """
    doubts: list[str] = []
    is_example = not engines
    if is_example:
        doubts.append(
            "no engine was found: start it, or give --url; the instance below is an example"
        )
        engines = [FoundEngine(url="http://127.0.0.1:8000", kind="vllm", told={})]
    numbers: Counter[str] = Counter()
    tables = []
    for engine in engines:
        role = engine.role or "colocated"
        name = f"{role}-{numbers[role]}"
        numbers[role] += 1
        said: list[str] = []
        if engine.role is None:
            said.append("its role could not be told; taken as colocated")
        gpus = engine.gpus(held)
        if not gpus and len(engines) == 1 and gpu_names:
            gpus = tuple(gpu_names)
            said.append("its GPUs could not be told; as the only engine it is given all of them")
        elif not gpus:
            said.append(_gpus_unknown(engine))
        boards = {gpu_names[one] for one in gpus if one in gpu_names}
        profile, doubt = _profile(engine.model, boards, len(gpus))
        if doubt:
            said.append(doubt)
        if engine.kind == "dynamo":
            said.append(
                "a Dynamo worker has another id and FPM address at every start: run init again,"
                " or with --keep-fresh"
                if engine.worker_id is not None
                else "its worker id could not be told"
            )
        if not is_example:  # of one nothing is to be found
            doubts += [f"{name}: {one}" for one in said]
        at = engine.process.node if engine.process and engine.process.node else node
        tables.append(
            _table(name, role, at, profile, engine, gpus, said, _own_cpus(engine, engines))
        )
    head = [f"#:schema {schema}"] if schema else []
    head += ["# Written by voltana-ctrl init; look through it before anything acts on it."]
    return FleetDraft(text="\n".join([*head, "", *tables]), doubts=tuple(doubts))


def _gpus_unknown(engine: FoundEngine) -> str:
    if engine.process is None or engine.process.pod is None:
        return "its GPUs could not be told: fill in their UUIDs (nvidia-smi -L)"
    return (
        "the GPUs of its pod could not be told: run this on its node, with"
        " /var/lib/kubelet/device-plugins mounted read-only, or fill in their UUIDs"
    )


def _table(
    name: str,
    role: str,
    node: str,
    profile: str,
    engine: FoundEngine,
    gpus: Sequence[str],
    said: Sequence[str],
    cpus: Sequence[int],
) -> str:
    parts = [f"kind = {_quoted(engine.kind)}", f"url = {_quoted(engine.url)}"]
    if gpus:
        parts.append(f"gpus = [{', '.join(map(_quoted, gpus))}]")
    if engine.worker_id is not None:
        parts.append(f"worker_id = {engine.worker_id}")
    if engine.bootstrap_port is not None:
        parts.append(f"bootstrap_port = {engine.bootstrap_port}")
    if engine.fpm is not None:
        parts.append(f"fpm = {_quoted(engine.fpm)}")
    if engine.limits is not None:
        parts.append(f"limits = {_quoted(engine.limits)}")
    said = list(said)
    if cpus:  # what else is bound to them cannot be told: a person says that nothing is
        said.append(
            "to let --actuators limit its CPU clock, see that nothing else runs on the CPUs that it"
            f" is bound to, and add to engine: cpus = {_quoted(_ranges(cpus))}"
        )
    if engine.process and engine.process.pod_name:
        said.append(f"pod {engine.process.pod_name}")
    return "\n".join(
        [
            *(f"# {one}" for one in said),
            "[[instance]]",
            f"id = {_quoted(name)}",
            f"role = {_quoted(role)}",
            f"node = {_quoted(node)}",
            f"profile = {_quoted(profile)}",
            f"engine = {{ {', '.join(parts)} }}",
            "",
        ]
    )


def _own_cpus(engine: FoundEngine, engines: Sequence[FoundEngine]) -> tuple[int, ...]:
    """CPUs that this engine is bound to, and no other one."""
    bound = [one.process.cpus for one in engines if one.process is not None]
    ours = () if engine.process is None else engine.process.cpus
    times = Counter(cpu for cpus in bound for cpu in cpus)
    return ours if all(times[cpu] == 1 for cpu in ours) else ()


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as Linux writes lists of CPUs: 0-3,8."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", "", escaped) + '"'


def _profile(model: str | None, boards: set[str], gpus: int) -> tuple[str, str | None]:
    """Shipped profile of a GPU and a model, and what is doubtful about it."""
    served = _words(model or "")

    def score(name: str) -> tuple[bool, bool, int, int]:
        """Whether GPU and model are those of a profile, else how near they are."""
        board, _, wanted = name.partition("/")
        parts = _words(board)
        here = [_words(one) & parts for one in boards]
        kind = board.partition("-")[0]
        needed = {word for word in _words(wanted) if not re.fullmatch(r"tp\d+", word)}
        return (
            bool(boards) and all(kind in one for one in here),
            needed <= served,
            sum(map(len, here)) + len(needed & served),
            -abs(load_profile(name).gpus - max(1, gpus)),
        )

    best = max([DEFAULT, *list_profiles()], key=score)  # the first of equals
    of_board, of_model, _, _ = score(best)
    missing = []
    if not of_board:
        missing.append(f"GPU {', '.join(sorted(boards)) or 'of unknown name'}")
    if not of_model:
        missing.append(f"model {model or 'of unknown name'}")
    if not missing:
        return best, None
    return best, (
        f"no shipped profile is of {' with '.join(missing)}: {best} stands in, and its watts are"
        " not yours; measure with voltana-ctrl profile and fit"
    )


def _words(text: str) -> set[str]:
    """Words of a name as profiles write them: NVIDIA A100-SXM4-80GB is a100, sxm, 80gb."""
    parts = re.split(r"[^a-z0-9.]+", text.lower())
    return {re.sub(r"^sxm\d$", "sxm", part) for part in parts if part}
