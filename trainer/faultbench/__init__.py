"""Fault injection for `trainer bench`, `trainer verify-resume` and the tests."""
