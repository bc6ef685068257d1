"""Schedulers: one file a method, on one grid and one exponential-integrator core."""
