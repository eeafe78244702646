"""Lists in, ledger rows and queue messages out; never imports torch."""
