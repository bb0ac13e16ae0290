"""``python -m voltana_ctrl``: the command line."""

from voltana_ctrl.cli import main

main()
