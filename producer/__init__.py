"""Lists in, ledger rows and queue messages out; never imports torch. `producer.submit()` is the Python API."""

from producer.submit import Submitted, submit

__all__ = ["Submitted", "submit"]
