"""A memory calibrated for a model with passages of text."""
