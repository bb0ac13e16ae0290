"""The profiler: a live engine measured over clocks and loads, into a table for `fit`."""
