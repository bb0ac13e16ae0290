"""``python -m voltana_ctrl.cli``: the command line without its script."""

from __future__ import annotations

from voltana_ctrl.cli import main

main()
