"""Makes docs/images/serve-page.png: the web page of `indexmem serve` in a browser, after a conversation with the demo model.

Needs the server (make server, with npm) and Chromium (Debian: apt install npm chromium): python docs/tools/serve_picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

from indexmem_edge import demo_model

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))
from support.server_page import ask, browsing, why_not  # noqa: E402
from support.serving import serving  # noqa: E402

PICTURE = ROOT / "docs" / "images" / "serve-page.png"


def main() -> None:
    if why_not():
        sys.exit(why_not())
    options = ("--kv-budget", 256, "-n", 96, "--temp", 0, "--webui")
    with serving(Path(demo_model()), *options) as server, browsing(1000, 640) as page:
        page.open(f"http://127.0.0.1:{server.port}/")
        ask(page, "Name a river in Africa.")
        PICTURE.write_bytes(page.picture())
    print(f"{PICTURE.relative_to(ROOT)}: {PICTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
