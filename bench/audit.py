"""What is installed with the library: a bill of materials, and known weaknesses in it.

    python bench/audit.py sbom.json                   # CycloneDX 1.5, of the library and its extras
    python bench/audit.py sbom.json --extras server,nvml
    python bench/audit.py --check                     # through pip-audit, where it is installed

The list is the closure of the declared requirements in this environment, with the versions that are
installed here and the licences that they declare. Exit status 1 where a requirement is not
installed, a weakness is known, or something could not be looked up.
"""

import argparse
import json
import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from packaging.requirements import Requirement

LIBRARY = "voltana-ctrl"
ROOT = Path(__file__).resolve().parents[1]
EXTRAS = ("server", "nvml", "report")


def requirements(extras: tuple[str, ...]) -> list[Requirement]:
    """What the library asks for, by its own declaration."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    texts = list(project["dependencies"])
    for extra in extras:
        if extra not in project["optional-dependencies"]:
            raise SystemExit(f"audit: no extra {extra!r}")
        texts += project["optional-dependencies"][extra]
    return [Requirement(text) for text in texts]


def closure(asked: list[Requirement]) -> tuple[dict[str, metadata.Distribution], list[str]]:
    """Distributions that these bring, by name, and those that are not installed."""
    found: dict[str, metadata.Distribution] = {}
    missing, todo, seen = [], [(one, "") for one in asked], set()
    while todo:
        one, extra = todo.pop()
        if one.marker is not None and not one.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        if (name, *sorted(one.extras)) in seen:
            continue
        seen.add((name, *sorted(one.extras)))
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            missing.append(str(one))
            continue
        found[name] = installed
        needs = [Requirement(text) for text in installed.requires or ()]
        todo += [(need, inner) for need in needs for inner in ("", *one.extras)]
    return dict(sorted(found.items())), sorted(set(missing))


def licence(one: metadata.Distribution) -> str:
    """What a distribution says of its licence."""
    told = one.metadata.get("License-Expression") or ""
    classified = [line.rpartition(" :: ")[2] for line in one.metadata.get_all("Classifier") or ()
                  if line.startswith("License ::")]  # fmt: skip
    first = (one.metadata.get("License") or "").strip().partition("\n")[0]
    return told or ", ".join(classified) or first[:80] or "not declared"


def bill(extras: tuple[str, ...]) -> tuple[dict, list[str]]:
    """Bill of materials, and what is missing."""
    from voltana_ctrl import __version__

    found, missing = closure(requirements(extras))
    components = [
        {
            "type": "library", "name": name, "version": one.version,
            "purl": f"pkg:pypi/{name}@{one.version}",
            "licenses": [{"license": {"name": licence(one)}}],
        }
        for name, one in found.items()
    ]  # fmt: skip
    told = {
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": {"type": "library", "name": LIBRARY, "version": __version__}},
        "components": components,
    }  # fmt: skip
    return told, missing


def check(extras: tuple[str, ...]) -> int:
    """Known weaknesses of what is installed, by pip-audit."""
    if find_spec("pip_audit") is None:
        print("audit: pip-audit is not installed: pip install pip-audit, in any environment")
        return 1
    found, _ = closure(requirements(extras))
    pins = "".join(f"{name}=={one.version}\n" for name, one in found.items())
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--format", "json",
         "-r", "/dev/stdin"],
        input=pins, text=True, stdout=subprocess.PIPE, check=False,
    )  # fmt: skip
    try:
        told = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        print(f"audit: pip-audit ended with {done.returncode} and told nothing")
        return 1
    weak = [one for one in told if one.get("vulns")]
    for one in weak:
        known = ", ".join(each["id"] for each in one["vulns"])
        print(f"{one['name']} {one['version']}: {known}")
    # pip-audit takes what its index does not answer for as audited.
    unknown = [one["name"] for one in told if "skip_reason" in one]
    if unknown:
        print(f"audit: {len(unknown)} of {len(told)} could not be looked up; can the index be"
              f" reached? {', '.join(unknown[:5])}, ...")  # fmt: skip
    print(f"audit: {len(told) - len(unknown)} looked up, {len(weak)} with known weaknesses")
    return int(bool(weak or unknown))


def main(arguments: list[str] | None = None) -> int:
    """Write the bill, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bill", type=Path, nargs="?", help="JSON file to write")
    parser.add_argument("--extras", default=",".join(EXTRAS))
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args(arguments)
    extras = tuple(filter(None, asked.extras.split(",")))
    if asked.check:
        return check(extras)
    told, missing = bill(extras)
    text = json.dumps(told, indent=1) + "\n"
    if asked.bill is None:
        print(text, end="")
    else:
        asked.bill.write_text(text, encoding="utf-8")
    for one in missing:
        print(f"audit: not installed here: {one}", file=sys.stderr)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main())
