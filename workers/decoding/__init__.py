"""An open file in, its samples out, decoded in disposable sandboxed processes."""
