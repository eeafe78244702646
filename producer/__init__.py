"""Lists in, ledger rows and queue messages out; never imports torch.

A program submits with `producer.submit.submit`. A worker imports `producer.feeder` alone, so this
package loads neither.
"""
