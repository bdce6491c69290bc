"""Simulation: workers, the run, evaluation, reports, the command line."""
