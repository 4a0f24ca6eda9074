"""What pip needs to know of megalr. The versions it is tested with are in requirements.txt."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megalr/version.py").read_text(encoding="utf-8"), re.M)
README = ROOT / "README.md"

setup(
    name="megalr",
    version=VERSION[1],
    description="Low-rank and projected optimizers that pretrain language models under DeepSpeed ZeRO",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["megalr", "megalr.*"]),
    package_data={"megalr": ["py.typed"], "megalr.data": ["austen/*"]},
    zip_safe=False,
    python_requires=">=3.11",
    # The tests have passed with exactly these, all at once. DeepSpeed 0.19.7 fails some of them: what megalr reads of
    # its inside changes between releases.
    install_requires=[
        "torch>=2.9.1",
        "deepspeed>=0.19.8",
        "transformers>=5.4",
        "datasets>=4.4",
        "huggingface_hub>=1.5",
        "tokenizers>=0.22.2",
        "numpy>=2.0",
        "pyarrow>=21.0",
        "psutil>=5.9",
        "pyyaml>=6.0",
        "tqdm>=4.66.3",
        "matplotlib>=3.9",
        "tensorboard>=2.18",
    ],
    extras_require={
        "mpi": ["mpi4py>=4.0"],
        "trainer": ["accelerate>=1.15"],
        "dev": ["pytest>=9.2", "ruff>=0.17", "mypy>=2.4", "types-tqdm", "types-PyYAML"],
    },
)
