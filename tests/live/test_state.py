"""What was learnt outlives the process: whole, or set aside, never half-read."""

import json
import logging
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from voltana_ctrl import FleetSpec, FleetState, Observation, Slo, load_profile
from voltana_ctrl.live.governed import fleet_policy
from voltana_ctrl.live.state import StateFile
from voltana_ctrl.types import Belief

PROFILE = load_profile("a100-sxm-80gb/llama-3.1-8b")
FLEET = FleetSpec.parse("2P2D", PROFILE)
SLO = Slo(ttft_s=0.6, itl_s=0.06)
LEARNT = replace(
    Belief.of_profiles(FLEET, margin_frac=(0.05, 0.11), delay_s=0.025),
    prefill_pace_frac=np.array([1.1, 1.2, 1.0, 1.0]),
    decode_pace_frac=np.array([1.0, 1.0, 1.3, 0.9]),
    able_mhz=np.array([1410.0, 1005.0, 1410.0, 1200.0]),
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state.json"


def same(found: Belief | None, expected: Belief = LEARNT) -> bool:
    names = ("ttft_margin_frac", "itl_margin_frac", "prefill_pace_frac", "decode_pace_frac",
             "able_mhz")  # fmt: skip
    return found is not None and all(
        np.array_equal(getattr(found, name), getattr(expected, name)) for name in names
    )


def test_it_comes_back_to_the_last_bit_and_is_ours_alone(path):
    StateFile(path, FLEET).write(LEARNT)
    assert same(StateFile(path, FLEET).read())
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.name for one in path.parent.iterdir()] == ["state.json"]


def test_a_file_cut_anywhere_is_set_aside_and_nothing_of_it_is_used(path, caplog):
    StateFile(path, FLEET).write(LEARNT)
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 2, 37):
        path.write_bytes(whole[:cut])
        with caplog.at_level(logging.WARNING, "voltana_ctrl"):
            assert StateFile(path, FLEET).read() is None
        assert not path.exists()
        assert path.with_name("state.json.set-aside").read_bytes() == whole[:cut]
        assert "set aside as" in caplog.text
        caplog.clear()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_one_byte_that_changed_is_seen(path, at, byte):
    StateFile(path, FLEET).write(LEARNT)
    data = bytearray(path.read_bytes())
    data[at % len(data)] = byte
    path.write_bytes(data)
    found = StateFile(path, FLEET).read()
    # Either nothing of it is used, or the change was between the values.
    assert found is None or same(found)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "voltana-ctrl/state/2"}, "expected schema"),
        ({"sha256": "0"}, "checksum"),
        ({"learnt": []}, "checksum"),
    ],
)
def test_a_foreign_file_is_set_aside(path, change, words, caplog):
    StateFile(path, FLEET).write(LEARNT)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with caplog.at_level(logging.WARNING, "voltana_ctrl"):
        assert StateFile(path, FLEET).read() is None
    assert words in caplog.text


def test_a_file_that_others_may_write_is_not_believed(path, caplog):
    StateFile(path, FLEET).write(LEARNT)
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING, "voltana_ctrl"):
        assert StateFile(path, FLEET).read() is None
    assert "others can write it" in caplog.text


def test_values_beyond_what_can_be_are_refused_though_the_checksum_fits(path, caplog):
    from voltana_ctrl.live import state

    StateFile(path, FLEET).write(LEARNT)
    told = json.loads(path.read_text())
    for value in (1e9, -5.0, True, "1.0", None):
        told["learnt"]["decode-0"]["decode_pace_frac"] = value
        told["sha256"] = state._checksum(told["learnt"])
        path.write_text(json.dumps(told))
        with caplog.at_level(logging.WARNING, "voltana_ctrl"):
            assert StateFile(path, FLEET).read() is None
        assert "decode-0" in caplog.text


def test_only_what_the_fleet_still_has_counts(path):
    StateFile(path, FLEET).write(LEARNT)
    grown = FleetSpec.parse("3P2D", PROFILE)
    found = StateFile(path, grown).read()
    assert found.prefill_pace_frac.tolist() == [1.1, 1.2, 1.0, 1.0, 1.0]
    assert found.itl_margin_frac.tolist() == [0.11] * 5
    other = FleetSpec.parse("2P2D", load_profile("h100-sxm-80gb/llama-3.1-8b"))
    assert StateFile(path, other).read() is None
    assert path.exists()


def test_it_is_written_when_due_and_at_the_end(path):
    now_s = [0.0]
    state = StateFile(path, FLEET, every_s=30.0, now_s=lambda: now_s[0])
    told = SimpleNamespace(applied=SimpleNamespace(belief=LEARNT))
    state.on_tick(told)
    assert not path.exists()
    now_s[0] = 30.0
    state.on_tick(told)
    assert same(StateFile(path, FLEET).read())
    path.unlink()
    later = replace(LEARNT, able_mhz=np.full(4, 900.0))
    state.on_tick(SimpleNamespace(applied=SimpleNamespace(belief=later)))
    state.close()
    state.close()
    assert same(StateFile(path, FLEET).read(), later)


def test_a_disk_that_is_full_ends_nothing_and_is_said_once(path, monkeypatch, caplog):
    def full(*_args, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("voltana_ctrl.live.state.replace_file", full)
    state = StateFile(path, FLEET, every_s=1e-9)
    with caplog.at_level(logging.WARNING, "voltana_ctrl"):
        for _ in range(3):
            state.on_tick(SimpleNamespace(applied=SimpleNamespace(belief=LEARNT)))
    assert caplog.text.count("No space left") == 1


def test_a_controller_goes_on_from_what_was_learnt():
    fresh, goes_on = (fleet_policy(FLEET, SLO, "mpc", learnt=one) for one in (None, LEARNT))
    seen = Observation(state=replace(FleetState.idle(4), running_req=[0, 0, 20.0, 20.0],
                                     kv_used_tok=[0, 0, 9000.0, 9000.0]))  # fmt: skip
    before = fresh.decide(seen, fresh.init())[0].belief
    decision, memory = goes_on.decide(seen, goes_on.init())
    assert before is None or np.all(before.able_mhz == 1410.0)
    assert decision.belief.able_mhz.tolist() == [1410.0, 1005.0, 1410.0, 1200.0]
    # As certain as one record: a little nearer to the profile, and still beyond what it allows.
    assert 1.2 < decision.belief.decode_pace_frac[2] <= 1.3
    assert decision.belief.itl_margin_frac[2] >= 0.11 - 1e-9
    for k in range(5):
        later = replace(seen, state=replace(seen.state, t_s=0.1 * (k + 1)))
        decision, memory = goes_on.decide(later, memory)
    assert decision.belief.able_mhz[3] == 1200.0


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to write where others may not")
def test_a_link_is_not_followed(path, tmp_path):
    (tmp_path / "theirs").write_text("{}")
    path.symlink_to(tmp_path / "theirs")
    assert StateFile(path, FLEET).read() is None
    StateFile(path, FLEET).write(LEARNT)
    assert (tmp_path / "theirs").read_text() == "{}"
