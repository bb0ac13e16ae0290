"""The simulated fleet: workloads, trace readers, the discrete-event plant, its metrics."""
