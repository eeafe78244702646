"""Processes that fetch and decode a chunk's clips into shared memory, a window at a time."""
