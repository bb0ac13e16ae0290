"""A fleet while it runs: agents of nodes, their controller, metrics and logs."""
