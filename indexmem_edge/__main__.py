"""`python -m indexmem_edge` is `indexmem`."""

from .cli.app import main

main()
