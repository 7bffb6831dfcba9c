"""The Triton kernels: ``fused_lora/kernels/`` where the package is installed, ``kernels/`` beside it in a checkout.

That folder has no ``__init__.py``, so that a checkout on ``sys.path`` does not hide the package named ``kernels``.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
__path__ = [str(folder) for folder in (_HERE / "kernels", _HERE.parent / "kernels") if (folder / "tiles.py").is_file()]
