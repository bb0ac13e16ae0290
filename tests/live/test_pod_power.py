"""Power limits that pods are annotated with."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voltana_ctrl import ConfigError
from voltana_ctrl.live.pod_power import (
    ANNOTATION,
    LIMIT_VARIABLE,
    annotated_limit_w,
    power_limits_w,
)

IDS = ("prefill-0", "decode-0")


@given(
    watts=st.integers(1, 100_000),
    others=st.dictionaries(
        st.text("abcdefghij./-", min_size=1, max_size=12), st.text(max_size=20), max_size=4
    ),
)
def test_the_annotation_is_found_among_others(watts, others):
    lines = [f"{key}={json.dumps(value)}" for key, value in others.items()]
    assert annotated_limit_w("\n".join(lines)) is None
    lines.insert(len(lines) // 2, f'{ANNOTATION}="{watts}"')
    assert annotated_limit_w("\n".join(lines)) == watts


@pytest.mark.parametrize("value", ["", "0", "-5", "300W", "3e2", "1e9", "300.5", "٣٠٠"])
def test_what_is_no_number_of_watts_is_refused(value):
    with pytest.raises(ConfigError, match="whole watts"):
        annotated_limit_w(f'{ANNOTATION}="{value}"')


def test_the_lowest_of_several_counts(tmp_path):
    path = tmp_path / "annotations"
    path.write_text(f'app="decode"\n{ANNOTATION}="320"\n')
    found = power_limits_w(
        IDS, given=["350", "decode-0=250"], annotations=path, environment={LIMIT_VARIABLE: "310"}
    )
    assert found == {"prefill-0": 310.0, "decode-0": 250.0}
    assert power_limits_w(IDS) == {}
    assert power_limits_w(IDS, given=["decode-0=250"]) == {"decode-0": 250.0}


def test_what_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        power_limits_w(IDS, annotations=tmp_path / "absent")
    with pytest.raises(ConfigError, match="'decode-9'"):
        power_limits_w(IDS, given=["decode-9=300"])
    with pytest.raises(ConfigError, match=LIMIT_VARIABLE):
        power_limits_w(IDS, environment={LIMIT_VARIABLE: "much"})
