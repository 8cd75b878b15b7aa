"""Scores and likelihoods of tasks at equal bytes."""
