"""Samples in, scores out: windows, batches, the model. The only folder that imports torch."""
