"""Faults on purpose, for `trainer bench`, `trainer verify-resume` and the tests."""
