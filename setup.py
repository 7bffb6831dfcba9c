import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class BuildLoops(build_ext):
    """csrc/cpu_loops.c as a plain shared library, which ctypes loads: it knows neither Python nor torch.

    With OpenMP if the compiler has it. Without a compiler the package is complete but for the library, and plain torch
    does the work; ``fused-lora doctor`` says which of them runs.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return super().get_ext_filename(fullname).split(".")[0] + ".so"  # the same for every Python

    def build_extension(self, ext: Extension) -> None:
        plain = ext.extra_compile_args
        for openmp in (["-fopenmp"], []):
            ext.extra_compile_args = plain + (openmp or ["-fopenmp-simd"])
            ext.extra_link_args = [*openmp, "-lm"]
            try:
                return super().build_extension(ext)
            except Exception as error:  # whatever distutils raises: no compiler, no OpenMP, no such option
                failure = error
        print(f"fused_lora: built without its C loops, plain torch runs instead: {failure}", file=sys.stderr)


class AnyPython(bdist_wheel):
    """One wheel of a platform for every Python: its library belongs to no version of it."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


LOOPS = Extension(
    "fused_lora.ops._cpu_loops",
    ["csrc/cpu_loops.c"],
    # contraction would fuse what the source does not write as fmaf, and change bits; with Python's own -fwrapv gcc does
    # not vectorise the loops
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-wrapv"],
    optional=True,
)

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
    package_data={"fused_lora": ["py.typed"], "fused_lora.kernels": ["tuned/*.json"]},
    ext_modules=[LOOPS],
    cmdclass={"build_ext": BuildLoops, "bdist_wheel": AnyPython},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.8",
        # Triton exists for Linux only; elsewhere the CPU and eager paths do the work
        'triton>=3.4; sys_platform == "linux"',
        "safetensors>=0.4",
        "numpy>=2",
    ],
    extras_require={
        "test": [
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "peft>=0.21,<0.22",
            # of all releases of 5 those that the continuous batching engine was tested on; they need Python 3.11, and
            # below it the newest runs all tests but the engine's
            'transformers>=5.22,<5.25; python_version >= "3.11"',
            'transformers>=5.20,<5.22; python_version < "3.11"',
            "accelerate",
            "trl>=1,<2",
            "bitsandbytes>=0.50,<0.51",
            "torchao>=0.18,<0.19",
            "gguf",
            "jinja2",
            "fastapi",
            "uvicorn",
            "prometheus-client",
            "openai>=2",
            "httpx",
            "matplotlib",
            "ruff==0.17.5",
            "basedpyright==1.40.2",  # pyright with a node from PyPI: it downloads nothing when it runs
            "setuptools>=70.1",  # as pyproject.toml: tests build wheels
            "pyyaml",
            # wheels only: its sdist needs clang with libFuzzer
            'atheris>=3; sys_platform == "linux" and platform_machine == "x86_64" and python_version >= "3.11" '
            'and python_version < "3.15"',
            'schemathesis>=4.30,<5; python_version >= "3.11"',
        ],
        "quickstart": ["peft>=0.21,<0.22", "transformers>=5,<6", "accelerate", "gguf", "tqdm"],
        "bitsandbytes": ["bitsandbytes>=0.50,<0.51"],
        "torchao": ["torchao>=0.18,<0.19"],
        # the plug-in reaches into vLLM's LoRA layers, so it is pinned to the releases that were read
        "vllm": ["vllm>=0.32,<0.34"],
        "bench": ["fused_lora[quickstart,serve]", "matplotlib", "httpx"],
        # continuous batching reaches into transformers' engine, so it is pinned to the releases that were tested
        "serve": [
            "transformers>=5.22,<5.25",
            "accelerate",
            "jinja2",
            "fastapi",
            "pydantic>=2.8",
            "uvicorn",
            "prometheus-client",
        ],
    },
    entry_points={
        "console_scripts": ["fused-lora = fused_lora.cli:main"],
        "vllm.general_plugins": ["fused_lora = fused_lora.integrations.vllm:register"],
    },
    classifiers=[
        "Programming Language :: Python :: 3",
    ],
)
