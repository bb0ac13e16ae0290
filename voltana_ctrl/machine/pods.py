"""Pods as Kubernetes tells them: where their engines listen, and which GPUs they were given.

What a pod of a DaemonSet can read without more than read access:

- the kubelet's record of devices, ``/var/lib/kubelet/device-plugins`` mounted read-only: the UUIDs
  of the GPUs by the UID of the pod that holds them;
- the list of pods, from the API server with its own service account (``get`` and ``list`` on
  ``pods``), or as ``kubectl get pods -o json`` wrote it: addresses, ports, command lines and
  variables.

The kubelet's gRPC socket tells the former, too, by name of the pod; it would take gRPC and more
privilege, and its record is what it answers from.
"""

from __future__ import annotations

import os
import re
import shlex
import ssl
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from voltana_ctrl.errors import BackendError, ConfigError
from voltana_ctrl.machine.processes import Process, names_engine
from voltana_ctrl.textfile import json_value

__all__ = ["pod_gpus", "read_pods"]

_DEVICES = Path("/var/lib/kubelet/device-plugins/kubelet_internal_checkpoint")
_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_USUAL_PORT = {"sglang": 30000}
_LIMIT_S = 10.0


def pod_gpus(record: Path = _DEVICES) -> dict[str, tuple[str, ...]]:
    """Which GPUs the kubelet has given to which pods.

    Parameters
    ----------
    record : Path
        File in which the kubelet records devices.

    Returns
    -------
    dict of str to tuple of str
        UUIDs of GPUs and MIG slices by the UID of the pod; empty where there is no such record.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> entry = {"PodUID": "1c-2d", "ResourceName": "nvidia.com/gpu",
    ...          "DeviceIDs": {"0": ["GPU-1"], "1": ["GPU-2::0"]}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     record = pathlib.Path(folder) / "kubelet_internal_checkpoint"
    ...     _ = record.write_text(json.dumps({"Data": {"PodDeviceEntries": [entry]}}))
    ...     pod_gpus(record)
    {'1c-2d': ('GPU-1', 'GPU-2')}
    """
    found: dict[str, dict[str, None]] = {}
    try:
        entries = json_value(record.read_bytes(), str(record))["Data"]["PodDeviceEntries"]
        for entry in entries or ():
            if str(entry["ResourceName"]).startswith("nvidia.com/"):
                devices = entry["DeviceIDs"]
                # By NUMA node since Kubernetes 1.20, a list before.
                lists = devices.values() if isinstance(devices, Mapping) else [devices]
                # A GPU that is shared in turns is given as GPU-...::0, GPU-...::1.
                uuids = [str(one).partition("::")[0] for some in lists for one in some]
                held = found.setdefault(str(entry["PodUID"]), {})
                held |= dict.fromkeys(one for one in uuids if one.startswith(("GPU-", "MIG-")))
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return {uid: tuple(uuids) for uid, uuids in found.items()}


def read_pods(source: str, *, account: Path = _ACCOUNT) -> dict[str, Process]:
    """Addresses at which engines in pods may listen, as the list of pods tells.

    Parameters
    ----------
    source : str
        File that ``kubectl get pods -o json`` wrote, ``-`` for standard input, or ``cluster``: the
        API server, asked for the pods of the node that ``NODE_NAME`` names, or of all.
    account : Path
        Folder of the service account, with its token and the authority of the API server.

    Returns
    -------
    dict of str to Process
        By the address, the process that its pod describes, without a number.

    Raises
    ------
    ConfigError
        If it is no list of pods.
    BackendError
        If the API server does not answer, or refuses.

    Examples
    --------
    >>> read_pods("no-such-file.json")
    Traceback (most recent call last):
    voltana_ctrl.errors.ConfigError: pods: no-such-file.json: No such file or directory
    """
    try:
        if source == "cluster":
            text = _ask_cluster(account)
        else:
            text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        told = json_value(text, source)
        pods = told.get("items", [told])
        return {url: process for pod in pods for url, process in _servers(pod)}
    except OSError as error:
        if source == "cluster":
            raise BackendError(f"pods: the API server does not answer: {error}") from error
        raise ConfigError(f"pods: {source}: {error.strerror}") from error
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"pods: {source}: expected what kubectl get pods -o json writes, got something else"
            f" ({type(error).__name__}: {error})"
        ) from error


def _ask_cluster(account: Path) -> str:
    host = os.environ.get("KUBERNETES_SERVICE_HOST", "kubernetes.default.svc")
    port = os.environ.get("KUBERNETES_SERVICE_PORT", "443")
    host = f"[{host}]" if ":" in host else host
    url = f"https://{host}:{port}/api/v1/pods"
    if os.environ.get("NODE_NAME"):
        url += f"?fieldSelector=spec.nodeName={os.environ['NODE_NAME']}"
    token = (account / "token").read_text(encoding="utf-8").strip()
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {token}"})
    trust = ssl.create_default_context(cafile=str(account / "ca.crt"))
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trust)
    )
    with opener.open(request, timeout=_LIMIT_S) as answer:
        return str(answer.read().decode("utf-8"))


def _servers(pod: Mapping[str, Any]) -> Iterator[tuple[str, Process]]:
    """Addresses of the containers of a pod that look like engines."""
    named, spec, status = pod["metadata"], pod["spec"], pod.get("status") or {}
    address = status.get("podIP")
    if not address or status.get("phase") != "Running":
        return
    for container in spec["containers"]:
        command = tuple(_words([*(container.get("command") or ()), *(container.get("args") or ())]))
        limits = (container.get("resources") or {}).get("limits") or {}
        wants_gpu = any(str(name).startswith("nvidia.com/") for name in limits)
        image = str(container.get("image", ""))
        if not (wants_gpu or names_engine([*command, image])):
            continue
        process = Process(
            pid=None,
            command=command,
            environment={
                str(one["name"]): str(one["value"])
                for one in container.get("env") or ()
                if "value" in one
            },
            pod=str(named["uid"]),
            pod_name=f"{named.get('namespace', 'default')}/{named['name']}",
            node=spec.get("nodeName"),
        )
        told = process.option("--port")
        ports = {int(told)} if told and told.isdigit() else set()
        ports |= {
            int(one["containerPort"])
            for one in container.get("ports") or ()
            if one.get("protocol", "TCP") == "TCP"
        }
        usual = next((port for name, port in _USUAL_PORT.items() if name in image), 8000)
        host = f"[{address}]" if ":" in address else address
        for port in sorted(ports) or [usual]:
            yield f"http://{host}:{port}", process


def _words(given: list[str]) -> Iterator[str]:
    """Words of a command line, those of a line for a shell taken apart."""
    for before, word in zip(["", *given], given, strict=False):
        if not re.fullmatch(r"-\w*c", before):
            yield word
            continue
        try:
            yield from shlex.split(word)
        except ValueError:
            yield from word.split()
