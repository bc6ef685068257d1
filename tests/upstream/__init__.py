"""diffusers' own suites over our classes. `tests/common/test_upstream_suites.py` runs `suites.py` in a process of its own."""
