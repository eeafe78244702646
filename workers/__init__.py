"""A chunk in, final rows out."""
