"""From an open file to samples, in disposable sandboxed processes."""
