"""``python -m voltana_ctrl`` and ``voltana-ctrl``: the door to the command line.

Beside an engine the package is installed without its dependencies, so that no pin of the engine
moves; then even the parser of the command line may be missing, which is told in one line.
"""

from __future__ import annotations

import sys

from voltana_ctrl.errors import missing_package


def main() -> None:
    """Run the command line."""
    try:
        from voltana_ctrl.cli import main as run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("voltana_ctrl"):
            raise
        sys.stderr.write(f"voltana-ctrl: {missing_package(error)}\n")
        sys.exit(2)
    run()


if __name__ == "__main__":
    main()
