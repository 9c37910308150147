"""Launchers by cluster, and following a job from the terminal. Imports no torch."""
