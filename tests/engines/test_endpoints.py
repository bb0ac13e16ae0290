"""Where engines are: the fleet file with its engine tables."""

import pytest

from voltana_ctrl import FleetSpec, load_profile
from voltana_ctrl.engines.endpoints import Endpoint, load_endpoints
from voltana_ctrl.errors import ConfigError

GOOD = """
[[instance]]
role = "prefill"
profile = "a100-sxm-80gb/llama-3.1-8b"
engine = { kind = "sglang", url = "http://one:30000/", bootstrap_port = 8998, gpus = ["GPU-a"] }
[[instance]]
role = "decode"
profile = "a100-sxm-80gb/llama-3.1-8b"
engine = { kind = "vllm", url = "http://two:8000", fpm = "tcp://two:20380" }
"""


def test_one_file_describes_fleet_and_engines(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(GOOD)
    fleet, endpoints = load_endpoints(path)
    assert fleet.ids == FleetSpec.from_toml(path, load_profile).ids
    assert [endpoint.instance for endpoint in endpoints] == list(fleet.ids)
    assert endpoints[0] == Endpoint(
        instance="prefill-0",
        kind="sglang",
        url="http://one:30000",
        bootstrap_port=8998,
        gpus=("GPU-a",),
    )
    assert endpoints[1].metrics_url == "http://two:8000/metrics"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('kind = "vllm"', 'kind = "tgi"', "instance 2: engine: kind"),
        ('url = "http://two:8000"', 'url = "two:8000"', "url: expected http://"),
        ('url = "http://two:8000"', 'url = "http://::1:8000"', "an IPv6 address in brackets"),
        ('fpm = "tcp://two:20380"', 'fpm = "two"', "fpm: expected tcp://"),
        ('fpm = "tcp://two:20380"', "fpm = 3", "fpm: expected str, got 3"),
        ('fpm = "tcp://two:20380"', 'port = "3"', "unknown key 'port'; known are"),
        ("bootstrap_port = 8998", "bootstrap_port = 0", "bootstrap_port: expected 1 to 65535"),
        ('gpus = ["GPU-a"]', "gpus = [3]", "gpus: expected UUIDs in quotes"),
        ('kind = "vllm", ', "", "kind: missing"),
        ('role = "decode"', 'role = "decode"\ncount = 2', "instance 2: count: expected 1"),
    ],
)
def test_a_bad_engine_is_refused_by_name(tmp_path, old, new, words):
    assert old in GOOD
    path = tmp_path / "fleet.toml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError) as refused:
        load_endpoints(path)
    assert words in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("base", ["http://two:8000/v1", "http://two:8000/v1/", "http://two:8000"])
def test_the_base_url_of_clients_is_that_of_the_engine(tmp_path, base):
    path = tmp_path / "fleet.toml"
    path.write_text(GOOD.replace("http://two:8000", base))
    _, endpoints = load_endpoints(path)
    assert endpoints[1].url == "http://two:8000"
    assert endpoints[1].metrics_url == "http://two:8000/metrics"


def test_an_instance_without_an_engine_is_refused(tmp_path):
    path = tmp_path / "fleet.toml"
    path.write_text(GOOD + '[[instance]]\nrole = "decode"\nprofile = "h100-sxm-80gb/x"\n')
    with pytest.raises(ConfigError):
        load_endpoints(path)
    path.write_text(GOOD.rpartition("engine")[0])
    with pytest.raises(ConfigError, match="instance 2: engine: missing"):
        load_endpoints(path)
