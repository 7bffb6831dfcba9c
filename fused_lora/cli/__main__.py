"""``python -m fused_lora.cli``."""

import sys

from fused_lora.cli import main

if __name__ == "__main__":
    sys.exit(main())
