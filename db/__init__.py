"""What is known about each run and clip."""
