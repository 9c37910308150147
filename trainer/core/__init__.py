"""Foundations that every other package may import: errors, paths, files, processes, hardware."""
