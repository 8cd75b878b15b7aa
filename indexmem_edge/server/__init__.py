"""`python -m indexmem_edge.server`: llama-cpp-python's server, for programs and scripts that start it, with the options of the cache.

It serves one conversation at a time. `indexmem serve` is llama.cpp's own server, which serves several at once.
"""
