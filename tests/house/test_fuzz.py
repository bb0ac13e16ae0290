"""Whatever is read from outside: only errors of ours, in bounded time and memory."""

import importlib.util
import sys

import pytest


@pytest.fixture(scope="module")
def fuzz(root):
    path = root / "bench" / "fuzz.py"
    if not path.exists():
        pytest.skip("bench/ is not part of the source distribution")
    spec = importlib.util.spec_from_file_location("fuzz", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


#: What was found once: parser, input.
FOUND = [
    ("ladder", b"210:1410:1e-320"),
    ("ladder", b"210:inf:15"),
    ("whole numbers", b"1e400"),
    ("whole numbers", b"nan"),
    ("address", b"1:" + b"9" * 5000),
    ("pod annotations", b"dynamo.nvidia.com/gpu-power-limit=" + b"[" * 100_000),
    ("pod annotations", b"dynamo.nvidia.com/gpu-power-limit=" + b'"' + b"9" * 5000 + b'"'),
    ("page of vllm", b'vllm:num_requests_running{engine="0"} ' + b"9" * 400),
    ("settings file in an engine", b"gpus = 5"),
    ("settings in its environment", b"\n\n\n" + b"9" * 5000),
    ("fleet text", b"9999P9999D"),
    ("fleet text", "\u0661P1D".encode()),
    ("log, replayed", b"[" * 100_000 + b"\n"),
    ("give-back record", b'{"kind": "gpu", "uuid": [], "power_cap_w": "x"}'),
    (
        "pods",
        b'{"metadata": {"name": "p", "uid": "u"}, "spec": {"containers": [{"command":'
        b' ["vllm", "serve"], "ports": [{"containerPort": 1e400}]}]},'
        b' "status": {"podIP": "10.0.0.1", "phase": "Running"}}',
    ),
    ("actuator table", b"freq_mhz,set_power_cap_w\n1410,200\n"),
    (
        "actuator table",
        b"phase,freq_mhz,batch_req,asked_tok,wall_s,wall_se_s,energy_j,power_se_w,"
        b"set_power_cap_w\ndecode,1410,8,512,0,1e-5,5,0.5,200\n",
    ),
    ("give-back record", b'{"kind": "gpu", "uuid": "a", "restore_lock_mhz": [1e400, 1]}'),
]


@pytest.mark.parametrize(("name", "data"), FOUND, ids=lambda value: str(value)[:20])
def test_what_was_found_once_is_refused(fuzz, tmp_path, name, data):
    parser = next(one for one in fuzz.parsers(tmp_path) if one.name == name)
    findings = fuzz.Findings()
    fuzz.feed(parser, data, "found", findings, 0)
    assert not findings.failures
    assert findings.refused == 1


def test_engines_at_an_address_that_is_none_are_refused(fuzz, tmp_path):
    parser = next(one for one in fuzz.parsers(tmp_path) if one.name == "engines file")
    data = parser.seeds[0].replace(b"http://10.0.0.1:8000", b"http://10.0.0.1[]:8000")
    findings = fuzz.Findings()
    fuzz.feed(parser, data, "found", findings, 0)
    assert (findings.refused, findings.failures) == (1, {})


def test_every_parser_takes_what_it_is_meant_for(fuzz, tmp_path):
    for parser in fuzz.parsers(tmp_path):
        taken = fuzz.Findings()
        for data in parser.seeds:
            fuzz.feed(parser, data, parser.name, taken, 0)
        assert not taken.failures, parser.name
        assert taken.refused < len(parser.seeds), parser.name


def test_an_odd_answer_is_a_failure(fuzz):
    def takes(data):
        return int(data)

    found = fuzz.Findings()
    fuzz.feed(fuzz.Parser("odd", takes, (b"1",)), b"x", "odd 0", found, 0)
    assert found.failed
    assert "odd: ValueError" in next(iter(found.failures))


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.slow)])
def test_a_slice_of_a_million_inputs(fuzz, seed):
    found = fuzz.fuzz(4_000 if seed == 0 else 60_000, seed)
    assert not found.failures, {key: value[0] for key, value in found.failures.items()}
    assert found.grown_bytes < fuzz.MOST_BYTES
    assert 0.3 < found.refused / found.inputs < 0.95
