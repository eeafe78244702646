"""From samples to scores: windows, batches, the model."""
