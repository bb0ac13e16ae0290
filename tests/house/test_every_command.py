"""Every command there is, as a user without a home, on an installation that is read-only.

The commands are those that the command line has, so that a new one is not forgotten: it fails here
until it is said how it is run.
"""

import os
import signal
import socket
import stat
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from tests.fit.test_identify import PAIRS, simulate
from tests.helpers.bare_user import (
    NOBODY,
    as_bare_user,
    needs_bare_user,
    open_folder,
    read_only_copy,
)
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.fake_gpus import PROFILE, machine, needs_compiler, seconds_until
from tests.helpers.fake_pages import Pages
from voltana_ctrl import cli, load_profile
from voltana_ctrl.engines.emulated.fleet import free_ports

for module in ("uvicorn", "pynvml", "prometheus_client", "pyarrow", "aiohttp", "httpx"):
    pytest.importorskip(module, reason="needs the server, nvml and tables extras")

COMMANDS = tuple(typer.main.get_command(cli.app).commands)
PAGE = """vllm:num_requests_running{engine="0"} 0.0
vllm:num_requests_waiting{engine="0"} 0.0
vllm:kv_cache_usage_perc{engine="0"} 0.0
vllm:generation_tokens_total{engine="0"} 0.0
"""

pytestmark = [needs_bare_user, needs_compiler, pytest.mark.slow]


@dataclass
class Place:
    """What a machine has: engines, GPUs, and a folder that the user may write to."""

    installed: Path
    tmp: Path
    out: Path
    engine: str
    page: str
    gpu: str
    gpu_env: dict[str, str]

    def run(self, *arguments, **environment):
        command, settings = as_bare_user(
            self.installed, *arguments, tmp=self.tmp, VOLTANA_CTRL_TOKEN="x" * 40, **environment
        )
        return subprocess.Popen(
            command, **settings, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def place(root, tmp_path_factory):
    installed = read_only_copy(root, tmp_path_factory.mktemp("installed"))
    with open_folder() as folder:
        yield from _place(installed, folder)


def _place(installed, folder):
    tmp, out = folder / "tmp", folder / "out"
    tmp.mkdir()
    tmp.chmod(0o1777)
    out.mkdir(mode=0o700)
    table = simulate(load_profile(PROFILE), PAIRS)
    columns = ("phase", "freq_mhz", "batch_req", "kv_tok", "prefill_tok", "wall_s", "energy_j")
    rows = zip(*(getattr(table, name) for name in columns), strict=True)
    lines = [",".join(columns), *(",".join(map(str, row)) for row in rows)]
    (out / "table.csv").write_text("\n".join(lines) + "\n")
    with (
        machine(folder) as fake,
        FakeEngine(load_profile(PROFILE), fake.gpus[0]) as engine,
        Pages(metrics=PAGE, health="") as page,
    ):
        (out / "fleet.toml").write_text(
            f'[[instance]]\nrole = "colocated"\nprofile = "{PROFILE}"\n'
            f'engine = {{ kind = "vllm", url = "{page.url}" }}\n'
        )
        for path in (out, *out.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        gpu_env = {name: fake.env[name] for name in ("FAKE_NVML_STATE", "LD_LIBRARY_PATH")}
        Path(gpu_env["FAKE_NVML_STATE"]).chmod(0o666)
        fake.library.chmod(0o755)
        fake.library.parent.chmod(0o755)
        yield Place(
            installed=installed, tmp=tmp, out=out, engine=engine.url, page=page.url,
            gpu=fake.uuids[0], gpu_env=gpu_env,
        )  # fmt: skip


def how(place):
    """Arguments of each command, so few that it is soon done, and so many that it does its work."""
    out, fleet = place.out, ["--fleet", place.out / "fleet.toml"]
    short = ["--rate", "5", "--duration", "5", "--warmup", "0"]
    locks, ports = out / "locks", iter(free_ports(6))
    return {
        "compare": [*short, "--policies", "static-max,mpc", "--json", out / "c.json", "--csv",
                    out / "c.csv", "--store", out / "store"],
        "fit": [out / "table.csv", "--out", out / "mine.toml"],
        "profile": [place.engine, "--gpu", place.gpu, "--clocks", "1410", "--batches", "1",
                    "--contexts", "64", "--prompts", "64", "--steady", "0.1", "--pause", "0",
                    "--output-tok", "64", "--out", out / "measured.csv", "--lock-dir", locks],
        "doctor": [],
        "meter": ["--url", place.page, "--duration", "0.2"],
        "init": ["--url", place.page, "--out", out / "found.toml"],
        "agent": [*fleet, "--mode", "advise", "--log", out / "ticks.jsonl", "--duration", "2",
                  "--metrics", next(ports), "--state", out / "agent-state"],
        "controller": [*fleet, "--mode", "advise", "--duration", "2", "--port", next(ports),
                       "--log", out / "fleet-ticks.jsonl", "--state", out / "controller-state"],
        "router": ["--both", place.page, "--port", next(ports)],
        "serve": [*fleet, "--mode", "advise", "--duration", "2", "--port", next(ports), "--page",
                  next(ports)],
        "emulate": ["--fleet", "1C", "--duration", "1"],
        "demo": ["--fleet", "1C", "--duration", "6"],
        "setter": ["--gpu", place.gpu, "--uid", NOBODY, "--socket", out / "setter.sock",
                   "--lock-dir", locks],
        "restore": ["--lock-dir", locks],
        "dashboard": [],
        "savings": [out / "ticks.jsonl"],
        "policies": [],
        "profiles": ["--json"],
    }  # fmt: skip


#: Commands that serve until they are told to end.
SERVE = ("router", "setter")
#: Commands that refuse what they are given here, and with what words.
REFUSED = {"savings": "switchback"}
#: What is there afterwards.
WRITTEN = {
    "compare": ["c.json", "c.csv", "store"],
    "fit": ["mine.toml"],
    "profile": ["measured.csv"],
    "init": ["found.toml"],
    "agent": ["ticks.jsonl"],
    "controller": ["fleet-ticks.jsonl"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_it_does_its_work(place, name):
    assert name in how(place), f"say here how {name} is run"
    arguments = how(place)[name]
    process = place.run(name, *arguments, **place.gpu_env)
    try:
        if name in SERVE:
            seconds_until(lambda: process.poll() is not None or serves(place, arguments), 120.0)
            process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=240)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert "Traceback" not in errors, errors
    expected = {2} if name in REFUSED else {0}
    if name in SERVE:
        expected = {0, -signal.SIGTERM, 128 + signal.SIGTERM}
    assert process.returncode in expected, errors
    assert REFUSED.get(name, "") in errors
    for written in WRITTEN.get(name, ()):
        assert (place.out / written).stat().st_uid == NOBODY
    if name == "compare":
        _its_cache_is_private(place, errors)
    else:
        assert "compiling" not in errors


def serves(place, arguments):
    """Whether a command that listens at a socket or a port does so."""
    if "--socket" in arguments:
        return (place.out / "setter.sock").is_socket()
    with suppress(OSError), socket.create_connection(("127.0.0.1", arguments[-1]), 1.0):
        return True
    return False


def _its_cache_is_private(place, errors):
    """Compiled code is kept where nobody else can write, which is said once."""
    folder = place.tmp / f"voltana-ctrl-{NOBODY}"
    assert errors.count(str(folder)) == 1
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    kept = sorted(folder.rglob("*.nbc"))
    assert len(kept) > 30
    figures = ["--html", place.out / "c.html", "--plot", place.out / "c.png"]
    asked = how(place)["compare"]
    asked = asked[: asked.index("--store")] + figures
    again = place.run("compare", *asked, **place.gpu_env)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert "compiling" not in errors
    assert "Traceback" not in errors
    assert (place.out / "c.html").stat().st_uid == NOBODY
    assert sorted(folder.rglob("*.nbc")) == kept
