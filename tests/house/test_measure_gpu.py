"""The plan of measuring a GPU, rehearsed without one: complete, resumable, and it sets nothing."""

import json
import re
import subprocess
import sys

import pytest

from voltana_ctrl.fit import read_table


@pytest.fixture
def rehearse(root, tmp_path):
    script = root / "bench" / "measure_gpu.py"
    if not script.exists():
        pytest.skip("bench/ is not part of the source distribution")

    def run(*options):
        command = [sys.executable, str(script), str(tmp_path), *options]
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        return found.stdout

    run.script, run.folder = script, tmp_path
    return run


def test_a_rehearsal_is_complete_and_goes_on_where_it_was_cut_off(rehearse):
    rehearse("--rehearse")
    path = rehearse.folder / "steps.jsonl"
    text = path.read_text(encoding="utf-8")
    whole = [json.loads(line) for line in text.splitlines()]
    kinds = {each.get("kind") for each in whole[1:]}
    assert kinds == {"idle", "wave", "decode", "prefill", "gap", "product", "copy"}
    assert not any("error" in each for each in whole)
    assert len({each["step"] for each in whole}) == len(whole)
    table = read_table(rehearse.folder / "table.csv")
    assert set(table.phase) == {"decode", "prefill", "idle"}
    # Cut off in the middle of a line.
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:20]) + lines[20][:15], encoding="utf-8")
    said = (rehearse.folder / "predicted.json").read_bytes()
    rehearse("--rehearse")
    again = path.read_text(encoding="utf-8").splitlines()
    assert again[:20] == text.splitlines()[:20]
    assert {each["step"] for each in whole} == {
        json.loads(line)["step"] for line in again if line.endswith("}")
    }
    assert (rehearse.folder / "predicted.json").read_bytes() == said
    shown = rehearse("--compare").splitlines()
    assert len(shown) == 2 + len(json.loads(said)["steps"])


def test_nothing_is_set(rehearse):
    called = set(re.findall(r"nvml\.(nvml\w+)", rehearse.script.read_text(encoding="utf-8")))
    assert called
    assert all("Get" in name or name == "nvmlInit" for name in called), called
