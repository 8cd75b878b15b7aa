"""`python -m indexmem_edge` is `indexmem`."""

from .cli.start import main

main()
