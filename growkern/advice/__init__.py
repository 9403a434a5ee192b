"""Advice before compute is spent."""
