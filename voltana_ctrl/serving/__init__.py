"""The bounded HTTP server that router and controller share."""
