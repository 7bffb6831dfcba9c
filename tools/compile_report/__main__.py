"""``python tools/compile_report``: see report.py."""

import sys
from pathlib import Path

# a folder that is run has itself on the path, not its parent; the compiling processes import by the same path
sys.path[0] = str(Path(__file__).resolve().parent.parent)

if __name__ == "__main__":
    from compile_report.report import main

    sys.exit(main())
