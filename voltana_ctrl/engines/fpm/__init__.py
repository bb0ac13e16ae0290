"""Forward-pass metrics: one message per engine iteration, published and read."""
