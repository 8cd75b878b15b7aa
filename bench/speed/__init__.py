"""Speed, memory, and what a part of the cache costs."""
