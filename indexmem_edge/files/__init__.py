"""Readers and writers of files that all rooms share. Files are untrusted."""
