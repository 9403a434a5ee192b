"""COMMIT: staged tensors to the live model and optimizer; the only writer, and every write can be rolled back."""
