"""Conversations past the trained length."""
