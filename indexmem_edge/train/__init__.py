"""Training of indexers and memories on the GGUF file that is run. Everything here needs the extra `train` (PyTorch)."""
