"""Training: a loss, an optimizer and data become updated parameters."""
