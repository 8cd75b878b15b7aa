"""Run as a program: loads a model with the largest budget that `fit` finds, or without one, uses it, and prints as JSON what was
said and what the process took. Arguments: the file, the type of the cache, and `budget` or `none`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from indexmem_edge import Llama
from indexmem_edge.models.fit import Memory, fit
from indexmem_edge.native.memory import resident_memory


def let_go_of_pages(path: str) -> None:
    """Weights that are kept in another form than the file's are read from it once. Where there is room the system leaves these pages with
    the process; what is needed of the file comes back when it is read."""
    for line in Path("/proc/self/maps").read_text().splitlines() if sys.platform == "linux" else ():
        if line.endswith(path):
            start, end = (int(number, 16) for number in line.split()[0].split("-"))
            assert ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4) == 0  # MADV_DONTNEED


def main() -> None:
    found = fit(sys.argv[1], Memory(64 << 30))
    rows = [row for row in found.rows if row.cache_type == sys.argv[2] and bool(row.budget) == (sys.argv[3] == "budget")]
    row = max(rows, key=lambda r: r.exact)
    sizes = row.sizes
    assert sizes is not None
    llm = Llama(found.path, verbose=False, kv_checkpoints=0, kv_cancel=False, kv_warn=lambda _: None, **found.row_keywords(row))
    loaded = resident_memory()
    llm.prefill([5 + i % 200 for i in range(700)])
    for _ in range(3):
        llm.eval([7])
    used = resident_memory()
    let_go_of_pages(found.path)
    llm.eval([7])
    print(json.dumps({
        "loaded": loaded,
        "used": used,
        "needed": resident_memory(),
        "said_loaded": found.program + sizes.model + sizes.sidecar + sizes.total,
        "said_used": row.total - sizes.copies(found.copies),
        "cache": sizes.total,
        "stats": llm.kv_stats().to_dict(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
