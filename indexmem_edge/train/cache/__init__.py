"""The bounded cache in PyTorch: what leaves when, and what later queries would have looked at."""
