"""The page on the router: its blocks run as they stand; the command ends gracefully."""

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types

import httpx
import pytest
import typer

from tests.helpers.mock_engine import MockEngine, fleet_of
from voltana_ctrl.engines.endpoints import ENGINES, load_endpoints


@pytest.fixture(scope="module")
def blocks(root):
    text = (root / "docs" / "router.md").read_text(encoding="utf-8")
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.M | re.S)
    return {kind: [body for k, body in found if k == kind] for kind, _ in found}


@contextlib.contextmanager
def command(root, *arguments, **environment):
    """Run `voltana-ctrl router` on a free port; yields the process and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "voltana_ctrl.cli", "router", *arguments, "--port", str(port)],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        stderr=subprocess.PIPE,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until_s = time.monotonic() + 120
        while True:
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{url}/health")
                break
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < until_s
            time.sleep(0.1)
        yield process, url
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_use_takes_at_most_fifteen_lines(blocks):
    shown = blocks["console"][0] + blocks["python"][0]
    assert len(shown.splitlines()) <= 15


def test_the_first_blocks_run_and_sigterm_lets_requests_end(root, blocks, capsys):
    pytest.importorskip("openai", reason="needs the openai package")
    install, line = blocks["console"][0].splitlines()
    assert install.startswith("$ pip install")
    _, _, *arguments = shlex.split(line.removeprefix("$ "))
    arguments = arguments[: arguments.index("--port")]
    with MockEngine("p") as prefill, MockEngine("d", tokens=30) as decode:
        addresses = {"http://10.0.0.1:8000": prefill.url, "http://10.0.0.2:8000": decode.url}
        arguments = [addresses.get(argument, argument) for argument in arguments]
        with command(root, *arguments) as (process, url):
            exec(blocks["python"][0].replace("http://127.0.0.1:8790", url), {})
            printed = capsys.readouterr().out
            assert printed.startswith(" 0 1 2")
            assert "source=modelled" in printed
            decode.fail = [500]
            assert httpx.post(f"{url}/v1/completions", json={"prompt": "x"}).status_code == 200
            decode.gap_s = 0.02
            body = {"prompt": "x", "max_tokens": 30, "stream": True}
            with httpx.stream("POST", f"{url}/v1/completions", json=body) as got:
                chunks = got.iter_raw()
                begin = next(chunks)
                process.send_signal(signal.SIGTERM)
                whole = begin + b"".join(chunks)
            assert whole.endswith(b"data: [DONE]\n\n")
            assert process.wait(20) in (0, -signal.SIGTERM)  # uvicorn raises it anew at the end
            # What went wrong with an engine is told where the command runs.
            assert "decode-0: status 500" in process.stderr.read()
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/health")


def test_the_fleet_file_reads(blocks, tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(blocks["toml"][0])
    fleet, endpoints = load_endpoints(path)
    assert fleet.ids == ("prefill-0", "decode-0")
    assert endpoints[1].worker_id == 7587889


def test_the_loop_is_wired(blocks):
    names = {}
    exec(blocks["python"][1], names)
    with names["loop"] as loop:
        loop.tick()
        assert names["proxy"].counts.state().freq_mhz.all()
        assert names["proxy"].counts.source is loop


def test_requests_go_to_dynamos_instances_by_policy(blocks, monkeypatch):
    sent = []

    class Part:
        def data(self):
            return {"token_ids": [1]}

    class Client:
        async def wait_for_instances(self):
            return [902, 901]

        async def direct(self, request, instance_id):
            sent.append(instance_id)

            async def answer():
                for _ in range(3):
                    yield Part()

            return answer()

    class Runtime:
        def endpoint(self, name):
            assert name == "dynamo.backend.generate"
            return self

        async def client(self):
            return Client()

    package = types.ModuleType("dynamo")
    package.runtime = types.ModuleType("dynamo.runtime")
    package.runtime.DistributedRuntime = Runtime
    monkeypatch.setitem(sys.modules, "dynamo", package)
    monkeypatch.setitem(sys.modules, "dynamo.runtime", package.runtime)
    names = {}
    exec(blocks["python"][2], names)

    async def main():
        async def requests():
            for _ in range(4):
                yield {"token_ids": [1, 2, 3]}

        return [part async for part in names["serve"](fleet_of("1P2D"), Runtime(), requests())]

    assert len(asyncio.run(main())) == 12
    assert sorted(set(sent)) == [901, 902]
    assert sent == [901, 902, 901, 902]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--fleet FILE"),
        (["--fleet", "fleet.toml", "--prefill", "http://one"], "not both"),
        (["--both", "http://one", "--port", "70000"], "port: expected 0 to 65535"),
        (["--prefill", "http://one"], "at least one --prefill and one --decode"),
        (["--both", "http://one", "--decode", "http://two"], "both kinds"),
        (["--both", "http://one", "--engine", "dynamo"], "ids"),
        (["--both", "one"], "http://HOST:PORT"),
        (["--prefill", "http://one,x", "--decode", "http://two"], "URL,PORT"),
        (["--both", "http://one", "--policy", "nothing"], "no such policy"),
        (["--both", "http://one", "--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--both", "http://one", "--tls-cert", "x.pem"], "certificate and key"),
        (["--both", "http://one", "--attempts", "0"], "attempts"),
        (["--fleet", "absent.toml"], "absent.toml"),
    ],
)
def test_what_cannot_be_meant_ends_with_one_line(arguments, words, capsys, monkeypatch):
    from voltana_ctrl.cli import main

    monkeypatch.setattr(sys, "argv", ["voltana-ctrl", "router", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert len(told.splitlines()) == 1


@pytest.mark.parametrize("more", [[], ["--telemetry"]])
def test_a_port_that_is_taken_ends_with_one_line(more, capsys, monkeypatch):
    from voltana_ctrl.cli import main

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = ["router", "--both", "http://127.0.0.1:9", "--port", port, *more]
        monkeypatch.setattr(sys, "argv", ["voltana-ctrl", *given])
        with pytest.raises(SystemExit) as end:
            main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"voltana-ctrl: router: 127.0.0.1:{port} cannot be listened on: ")
    assert "choose another port" in line


def test_every_engine_is_named_by_the_help():
    from voltana_ctrl.cli import app

    (option,) = (one for one in typer.main.get_command(app).commands["router"].params
                 if "--engine" in one.opts)  # fmt: skip
    assert all(name in option.help for name in ENGINES)


def test_a_token_from_the_environment_guards_the_router(root):
    with (
        MockEngine("c") as engine,
        command(root, "--both", engine.url, "--api-key-env", "KEY", KEY="s3cret",
                ) as (_, url),
    ):  # fmt: skip
        assert httpx.get(f"{url}/v1/models").status_code == 401
        good = httpx.get(f"{url}/v1/models", headers={"authorization": "Bearer s3cret"})
        assert good.status_code == 200


def test_with_telemetry_the_policy_decides(root):
    with (
        MockEngine("p") as prefill,
        MockEngine("d") as decode,
        command(
            root,
            "--prefill",
            prefill.url,
            "--decode",
            decode.url,
            "--telemetry",
            "--policy",
            "pack",
        ) as (process, url),
    ):
        body = {"prompt": "x", "max_tokens": 4}
        for _ in range(3):
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 200
            time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--controller", "http://127.0.0.1:1"), "token: expected one in --token-file"),
        (("--controller", "ftp://127.0.0.1:1", "--token-file", "token"), "expected http://"),
    ],
)
def test_what_is_refused_is_refused_before_anybody_is_told_of_a_router(
    given, said, tmp_path, monkeypatch, capsys
):
    from voltana_ctrl import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOLTANA_CTRL_TOKEN", raising=False)
    (tmp_path / "token").write_text("0123456789abcdef")
    arguments = ["router", "--both", "http://127.0.0.1:9", "--port", "0", *given]
    monkeypatch.setattr(sys, "argv", ["voltana-ctrl", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code not in (0, None)
    assert said in told
    assert "routes" not in told
