"""How a process runs: configuration, errors, console, progress, Ray."""
