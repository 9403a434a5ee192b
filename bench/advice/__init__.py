"""Validation of ``growkern.advise`` on the rows of the savings campaign, and calibration of its recipes from these rows."""
