"""Supervision of the ranks of one node: torchrun, hangs, stragglers, restarts. Imports no torch."""
