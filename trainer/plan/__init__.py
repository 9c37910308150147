"""Memory that a job will need on each rank, without the devices: a closed form, and a simulated step."""
