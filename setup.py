import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
# read, not imported: importing the package needs torch
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "fused_lora/_version.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="fused_lora",
    version=VERSION,
    description="Fast LoRA for PyTorch: fused training, merge with a bit-exact unmerge, many adapters in one batch",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["fused_lora", "fused_lora.*"]) + ["fused_lora.kernels"],
    # kernels/ is a top-level folder, but on PyPI the name belongs to another project: it is installed inside ours
    package_dir={"fused_lora.kernels": "kernels"},
    package_data={"fused_lora": ["py.typed"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        # Triton exists for Linux only; elsewhere the CPU and eager paths do the work
        'triton>=3.4; sys_platform == "linux"',
        "safetensors>=0.4",
        "numpy>=2",
    ],
    extras_require={
        # compiled CPU loops: merge and dropout without them take up to three times as long
        "cpu": ["numba>=0.61"],
        "test": [
            "fused_lora[cpu]",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "peft>=0.21,<0.22",
            # of all releases of 5 those that the continuous batching engine was tested on
            "transformers>=5.22,<5.24",
            "accelerate",
            "trl>=1,<2",
            "gguf",
            "jinja2",
            "fastapi",
            "uvicorn",
            "openai>=2",
            "httpx",
            "matplotlib",
            "ruff==0.17.5",
            "basedpyright==1.40.2",  # pyright with a node from PyPI: it downloads nothing when it runs
            "setuptools",
            "pyyaml",
        ],
        "quickstart": ["fused_lora[cpu]", "peft>=0.21,<0.22", "transformers>=5,<6", "accelerate", "gguf", "tqdm"],
        "bench": ["fused_lora[quickstart,serve]", "matplotlib", "httpx"],
        # continuous batching reaches into transformers' engine, so it is pinned to the releases that were tested
        "serve": ["transformers>=5.22,<5.24", "accelerate", "jinja2", "fastapi", "pydantic>=2.8", "uvicorn"],
    },
    entry_points={"console_scripts": ["fused-lora = fused_lora.cli:main"]},
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3",
    ],
)
