"""What pip needs to know of megalr. The versions it is tested with are in requirements.txt.

A wheel is pure Python: the ops of csrc/ are compiled at first use. ``MEGALR_BUILD_OPS=1 pip install .`` (or ``-e .``)
compiles them at once; a wheel that is built so is for one platform.
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD_OPS = os.environ.get("MEGALR_BUILD_OPS", "0") not in ("", "0")
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "megalr/version.py").read_text(encoding="utf-8"), re.M)
README = ROOT / "README.md"
RESOURCES = runpy.run_path(str(ROOT / "megalr/resources.py"))["IN_CHECKOUT"]

# The packages around build.py are stood in for: importing them would need everything that megalr needs.
PREBUILD = """
import sys, types
for name, path in (("megalr", sys.argv[1]), ("megalr.ops", sys.argv[1] + "/ops")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [path]
try:
    from megalr.ops import build
except ModuleNotFoundError as error:
    sys.exit(f"MEGALR_BUILD_OPS=1 compiles against torch, which has to be there before: pip install torch ({error})")
try:
    print("compiled", *build.prebuild())
except build.BuildError as error:
    sys.exit(f"MEGALR_BUILD_OPS=1: {error}")
"""


class BuildWithResources(build_py):
    """Ship csrc/, configurations, model shapes and recipes inside the package; compile the ops if asked to."""

    def run(self):
        super().run()
        package = ROOT / "megalr" if self.editable_mode else Path(self.build_lib, "megalr").resolve()
        if not self.editable_mode:
            shutil.rmtree(package / "ops/prebuilt", ignore_errors=True)
            for name, source in {"csrc": "csrc", **RESOURCES}.items():
                shutil.rmtree(package / name, ignore_errors=True)
                shutil.copytree(ROOT / source, package / name, ignore=shutil.ignore_patterns("emulation", "*.py", "_*"))
        if BUILD_OPS:
            # -I: pip builds in an environment of its own without torch; the user's is what is compiled against.
            done = subprocess.run([sys.executable, "-I", "-c", PREBUILD, str(package)], check=False)
            if done.returncode:
                sys.exit(done.returncode)


class WithOps(Distribution):
    """A wheel with compiled ops in it is for one platform."""

    def has_ext_modules(self):
        return BUILD_OPS


setup(
    name="megalr",
    cmdclass={"build_py": BuildWithResources},
    distclass=WithOps,
    version=VERSION[1],
    description="Low-rank and projected optimizers that pretrain language models under DeepSpeed ZeRO",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["pretraining", "low-rank", "optimizer", "DeepSpeed", "ZeRO", "GaLore", "Muon"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["megalr", "megalr.*"]),
    package_data={"megalr": ["py.typed"], "megalr.data": ["austen/*"]},
    entry_points={"console_scripts": ["megalr = megalr.commands:main"]},
    zip_safe=False,
    python_requires=">=3.11",
    # The tests have passed with exactly these lower bounds, all at once. DeepSpeed has an upper bound, too, because
    # megalr reads its internals (megalr/hosts/), which changed even between 0.19.7 and 0.19.8. The bound is the first
    # release that has not passed the contract. To raise it, install the release and run
    # `pytest tests/deepspeed/test_contract.py tests/unit/test_host_tables.py`, then `make test-all`.
    install_requires=[
        "torch>=2.9.1",
        "deepspeed>=0.19.8,<0.19.9",
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
        "evaluate": ["lm-eval>=0.4.13", "accelerate>=1.15"],
        "dev": ["pytest>=9.2", "hypothesis>=6.100", "ruff>=0.17", "mypy>=2.4", "types-tqdm", "types-PyYAML"],
    },
)
