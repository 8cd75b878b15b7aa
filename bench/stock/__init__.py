"""This library against a stock llama-cpp-python of the same release, in one run."""
