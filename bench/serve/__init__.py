"""llama.cpp's server, ours and a stock one, as its clients see it."""
