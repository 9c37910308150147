"""Data modules, and the loaders that resume exactly at any world size."""
