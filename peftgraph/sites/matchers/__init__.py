"""The parts of a graph before they have roles: projections, norms, residual adds, attention cores."""
