"""Memory and time of a job without its devices: a closed form, a simulated step, and a roofline of what they count."""
