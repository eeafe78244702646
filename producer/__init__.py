"""Lists in, ledger rows and queue messages out; never imports torch."""

from producer.submit import Submitted, submit

__all__ = ["Submitted", "submit"]
