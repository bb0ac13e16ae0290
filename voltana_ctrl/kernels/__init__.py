"""Compiled kernels: arrays and floats only, no exceptions, bounded loops.

Import the modules below, not this package: `layout` is plain NumPy, the others load Numba and
compile once per machine; `compiled` sees to where that is kept. Each folder mirrors its callers.

law      what one iteration takes and costs; the compiled twin of :mod:`voltana_ctrl.laws`
layout   record layouts shared by the plant, governors and routers
plant    the simulated fleet, event by event; called by :mod:`voltana_ctrl.sim.plant`
choose   clocks: the governor port, governors, assessment and target; called by `control`
route    the router port and the routers; called by :mod:`voltana_ctrl.routing`
learn    predictor and recursive least squares; called by :mod:`voltana_ctrl.estimate`
"""
