"""Pages in the browser: the live page, the review and the report."""
