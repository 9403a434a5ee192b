"""Verify a growth, and compare growth methods."""
