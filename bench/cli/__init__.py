"""The commands of `indexmem bench`."""
