"""Checks of this machine, or of the nodes of an allocation, each with the command that fixes what it finds.

Nothing here imports torch, except `measure`, which runs as a process of its own.
"""
