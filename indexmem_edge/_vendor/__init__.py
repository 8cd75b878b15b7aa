"""llama-cpp-python as this package uses it.

The build puts it here, with its imports of itself made relative and its library named by `native.find`, so that another
llama-cpp-python of the same environment, whatever its release, is neither used nor disturbed. `indexmem_edge.llama_cpp` is it.
"""

from __future__ import annotations

from ..native.find import require, vendor_dir

require()  # says in one line what is missing, before an import fails

if vendor_dir() not in map(str, __path__):
    __path__.append(vendor_dir())  # the clone's sources, when they are first on sys.path, borrow the built copy
