"""What pip installs; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "fastmnist/__init__.py").read_text(), re.M)
assert VERSION is not None

TENSORBOARD = ["tensorboard>=2.15"]
FFCV = ["ffcv>=1.0.2"]  # needs Debian's libopencv-dev, libturbojpeg0-dev and pkg-config first
TEST = ["pytest>=8", "hypothesis>=6.100", "scipy>=1.11", *TENSORBOARD]

setup(
    name="fastmnist",
    version=VERSION[1],
    description="MNIST compiled to a memory-mapped file, loaded at the memory's speed, trained in minutes",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="GPL-3.0-only",
    python_requires=">=3.10",
    packages=find_packages(include=["fastmnist", "fastmnist.*"]),
    package_data={"fastmnist": ["py.typed"], "fastmnist.report": ["*.jinja"]},
    entry_points={"console_scripts": ["fastmnist = fastmnist.cli:main"]},
    install_requires=[
        "jinja2>=3.1",
        "joblib>=1.3",
        "jsonargparse[signatures]>=4.49",
        "matplotlib>=3.8",
        "numba>=0.60",
        "numpy>=1.26",
        "pillow>=10",
        "platformdirs>=4",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "torch>=2.6",
        "torchvision>=0.21",
    ],
    extras_require={
        "test": TEST,
        "ffcv": FFCV,
        "tensorboard": TENSORBOARD,
        "notebook": ["jupyterlab>=4"],
        "dev": [*TEST, "mypy>=1.11", "ruff>=0.6", "pytest-benchmark>=4", "types-PyYAML"],
    },
)
