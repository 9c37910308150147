"""What is known of the devices that a job is planned for. Nothing in this package imports torch."""
