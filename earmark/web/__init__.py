"""Pages in the browser: the live page and the report."""
