"""Learning: the predictor and recursive least squares, for `estimate`."""
