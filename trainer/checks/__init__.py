"""Checks of a job before it is launched, beyond the types of its values. Imports no torch."""
