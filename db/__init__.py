"""The ledger of runs, clips and results: every read and write of the database."""
