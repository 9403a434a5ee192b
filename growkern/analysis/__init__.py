"""Check a growth from outside, and compare methods."""
