"""COMMIT: write staged tensors to the live model and optimizer, as the only writer. Every write can be rolled back."""
