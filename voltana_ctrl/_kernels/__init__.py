"""Compiled kernels: arrays and floats only, no exceptions, bounded loops.

Import the modules below, not this package: `layout` is plain NumPy, the others load Numba
(and compile once per machine; the result is cached on disk).

layout      record layouts shared by the plant, governors and routers
cost        what one iteration takes and costs
governors   the compiled governor port and the shipped governors
routers     the compiled router port and the shipped routers
clocks      clock actuation: dead time, serialised sets, settling
batching    admission, chunked prefill, preemption
plant       the event loop
"""
