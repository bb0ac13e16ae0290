"""The bill of materials and the long runs' own judgement."""

import importlib.util
import json
import sys

import pytest


def loaded(root, name, monkeypatch):
    path = root / "bench" / f"{name}.py"
    if not path.exists():
        pytest.skip("bench/ is not part of the source distribution")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


def test_the_bill_lists_what_is_asked_for_and_what_that_brings(root, tmp_path, monkeypatch):
    audit = loaded(root, "audit", monkeypatch)
    path = tmp_path / "sbom.json"
    audit.main([str(path), "--extras", ""])
    told = json.loads(path.read_text())
    assert told["bomFormat"] == "CycloneDX"
    by_name = {one["name"]: one for one in told["components"]}
    assert {"numpy", "numba", "llvmlite", "cvxpy", "clarabel", "typer", "rich"} <= set(by_name)
    assert by_name["numpy"]["purl"].startswith("pkg:pypi/numpy@")
    assert "BSD" in by_name["numpy"]["licenses"][0]["license"]["name"]


def test_what_is_not_installed_is_said(root, tmp_path, monkeypatch, capsys):
    audit = loaded(root, "audit", monkeypatch)
    monkeypatch.setattr(
        audit, "requirements", lambda extras: [audit.Requirement("no-such-package>=1")]
    )
    assert audit.main([str(tmp_path / "sbom.json")]) == 1
    assert "not installed here: no-such-package>=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("told", "words", "status"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], "1 looked up, 0 with known", 0),
        ([{"name": "a", "version": "1", "vulns": [{"id": "CVE-1"}]}], "a 1: CVE-1", 1),
        # Without an index nothing is known, which is not the same as nothing is wrong.
        ([{"name": "a", "skip_reason": "not found"}], "1 of 1 could not be looked up", 1),
        (None, "ended with 3 and told nothing", 1),
    ],
)
def test_what_could_not_be_looked_up_is_not_called_sound(
    root, monkeypatch, capsys, told, words, status
):
    audit = loaded(root, "audit", monkeypatch)
    said = "no json" if told is None else json.dumps({"dependencies": told})
    done = audit.subprocess.CompletedProcess([], 3, stdout=said)
    monkeypatch.setattr(audit, "find_spec", lambda name: name)
    monkeypatch.setattr(audit.subprocess, "run", lambda *_, **__: done)
    assert audit.main(["--check"]) == status
    assert words in capsys.readouterr().out


def test_growth_is_told_from_what_is_flat(root, monkeypatch):
    long = loaded(root, "long", monkeypatch)
    flat = long.Watched(rss_mb=[200.0, 240.0, 241.0, 239.0, 244.0, 243.0], descriptors=[12] * 6,
                        threads=[6] * 6)  # fmt: skip
    assert flat.grew() == []
    flat.rss_mb.append(300.0)
    flat.descriptors.append(13)
    assert flat.grew() == ["memory grew from 240.0 to 300.0 MB", "descriptors grew from 12 to 13"]


@pytest.mark.slow
def test_a_simulated_hour_is_flat(root, monkeypatch):
    long = loaded(root, "long", monkeypatch)
    told = []
    assert long.week(0.04, report=told.append) == []
    assert "M iterations" in told[0]
