"""What every other room may use and that knows of none: errors, paths, files, processes, hardware."""
