"""The report of a run: one HTML file without scripts that needs nothing from outside. Imports no torch."""
