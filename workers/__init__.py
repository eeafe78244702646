"""A worker: a chunk of clips in, their final rows in the ledger out."""
