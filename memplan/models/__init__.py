"""What is true of a model: its config, from the hub, a directory, a file or the catalogue."""
