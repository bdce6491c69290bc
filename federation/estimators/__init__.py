"""Estimators of the gate's gradient, as plugins: `fedquilt.estimators`."""
