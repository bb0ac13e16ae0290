"""Power limits that Kubernetes pods are annotated with, and that NVIDIA Dynamo enforces.

Dynamo's Power Agent (a privileged pod on every node, ``components/power_agent`` of
https://github.com/ai-dynamo/dynamo, pull requests 9682 and 12012) sets the power cap of each
GPU to the whole watts in the annotation ``dynamo.nvidia.com/gpu-power-limit`` of the pod that
uses it, every 15 s. Two programs that set the same cap undo each other; so ours sets no caps
beside it, and keeps clocks whose worst case stays within the limit.

A container sees the annotations of its own pod through the downward API, as a file::

    volumes:
      - name: podinfo
        downwardAPI:
          items: [{path: annotations, fieldRef: {fieldPath: metadata.annotations}}]

or as an environment variable (``fieldPath:
metadata.annotations['dynamo.nvidia.com/gpu-power-limit']``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from voltana_ctrl.errors import ConfigError
from voltana_ctrl.textfile import json_value

__all__ = ["ANNOTATION", "LIMIT_VARIABLE", "annotated_limit_w", "power_limits_w"]

#: Annotation that Dynamo's Power Agent obeys: watts per GPU, a whole number.
ANNOTATION = "dynamo.nvidia.com/gpu-power-limit"
#: Environment variable that is read for the same number.
LIMIT_VARIABLE = "VOLTANA_CTRL_GPU_POWER_LIMIT_W"


def annotated_limit_w(text: str, where: str = "pod annotations") -> float | None:
    r"""Power limit per GPU in the annotations file of the downward API.

    Parameters
    ----------
    text : str
        Text of the file: lines ``key="value"``, the value quoted and escaped.
    where : str
        Name of the file, for errors.

    Returns
    -------
    float or None
        Watts; None without the annotation.

    Raises
    ------
    ConfigError
        If the annotation is there, but no number of watts.

    Examples
    --------
    >>> annotated_limit_w('app="decode"\ndynamo.nvidia.com/gpu-power-limit="300"\n')
    300.0
    >>> annotated_limit_w('app="decode"') is None
    True
    """
    for line in text.splitlines():
        key, equals, quoted = line.partition("=")
        if key.strip() == ANNOTATION and equals:
            try:
                value = json_value(quoted, where)
            except ConfigError:
                value = quoted
            return _watts(f"{where}: {ANNOTATION}", value)
    return None


def _watts(name: str, value: object) -> float:
    text = str(value).strip()
    is_whole = text.isascii() and text.isdigit() and len(text) <= 6
    if not (is_whole and 0 < int(text) <= 100_000):
        raise ConfigError(f"{name}: expected whole watts per GPU such as 300, got {text[:60]!r}")
    return float(text)


def power_limits_w(
    ids: Sequence[str],
    *,
    given: Sequence[str] = (),
    annotations: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> dict[str, float]:
    """Power limit per GPU of each instance that has one; the lowest where several say so.

    Parameters
    ----------
    ids : sequence of str
        Instances of this node.
    given : sequence of str
        ``ID=WATTS``, or ``WATTS`` for all.
    annotations : Path, optional
        The annotations file of the downward API, for all.
    environment : mapping of str to str, optional
        Variables among which :data:`LIMIT_VARIABLE` is looked for, such as ``os.environ``.

    Returns
    -------
    dict of str to float
        Watts by the id of the instance; those without a limit are left out.

    Raises
    ------
    ConfigError
        If the file cannot be read, an instance is not there or a limit is no number.

    Examples
    --------
    >>> power_limits_w(["prefill-0", "decode-0"], given=["300", "decode-0=250"])
    {'prefill-0': 300.0, 'decode-0': 250.0}
    """
    found: list[tuple[str | None, float]] = []
    for text in given:
        name, equals, watts = text.rpartition("=")
        if equals and name not in ids:
            raise ConfigError(
                f"gpu-power-limit: expected an instance of {', '.join(ids)}, got {name!r}"
            )
        found.append((name if equals else None, _watts("gpu-power-limit", watts)))
    if annotations is not None:
        try:
            text = annotations.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"pod annotations {annotations}: cannot be read: {error}") from error
        limit_w = annotated_limit_w(text, str(annotations))
        if limit_w is not None:
            found.append((None, limit_w))
    told = (environment or {}).get(LIMIT_VARIABLE, "")
    if told:
        found.append((None, _watts(LIMIT_VARIABLE, told)))
    return {
        one: min(limits)
        for one in ids
        if (limits := [limit_w for name, limit_w in found if name in (None, one)])
    }
