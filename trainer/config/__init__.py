"""Composing, typing and reading the configuration of a job. Imports no torch."""
