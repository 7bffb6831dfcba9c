from setuptools import find_packages, setup

setup(
    name="fused_lora",
    version="0.1.0",
    description="LoRA in one pass: fused training, in-place merge with a bit-exact unmerge, many adapters at once",
    long_description=open("README.md", encoding="utf-8").read(),
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
            "setuptools",
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
