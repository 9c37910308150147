"""What can be found wrong with a job before it is launched, beyond its types. Imports no torch."""
