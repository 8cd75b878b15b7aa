"""The model in PyTorch, read from its files."""
