"""Figures of the devices that a job is planned for: memory, bandwidth, peak rates. Imports no torch."""
