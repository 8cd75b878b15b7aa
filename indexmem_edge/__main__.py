"""`python -m indexmem_edge` is `indexmem`."""

from .cli import main

main()
