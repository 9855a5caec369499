"""What pip installs; the tools' settings are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

SLUG = "fastmnist/fastmnist"  # of the repository: README's badge and the notebook name it too
HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "fastmnist/__init__.py").read_text(), re.M)
assert VERSION is not None

TENSORBOARD = ["tensorboard>=2.15"]
FFCV = ["ffcv>=1.0.2"]  # needs Debian's libopencv-dev, libturbojpeg0-dev and pkg-config first
FRAMEWORKS = ["accelerate>=1", "lightning>=2.4"]  # for the tests of docs/your-loop.md
PEERS = [
    "datasets>=5.1",
    "webdataset>=1.0.2",
    "litdata>=0.2.70",
    "grain>=0.2.13",
    "tensordict>=0.6",
    "spdl>=0.8",
    *FRAMEWORKS,
]
PEERS_STREAMING = ["mosaicml-streaming>=0.13"]  # wants numpy < 2.2 and an older datasets: an environment of its own
NOTEBOOK = ["ipykernel>=6", "ipython>=8", "nbclient>=0.9", "nbconvert>=7"]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.17"]
PYTEST = ["pytest>=8", "pytest-benchmark>=5", "pytest-xdist>=3.5", "hypothesis>=6.100", "selenium>=4.15"]
TEST = [*PYTEST, *EXPORT, *NOTEBOOK, *TENSORBOARD]

setup(
    name="fastmnist",
    version=VERSION[1],
    description="MNIST compiled to a memory-mapped file, loaded as fast as memory allows, trained in seconds",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    url=f"https://github.com/{SLUG}",
    license="GPL-3.0-only",
    python_requires=">=3.10",
    packages=find_packages(include=["fastmnist", "fastmnist.*"]),
    package_data={"fastmnist": ["py.typed"], "fastmnist.inference": ["*.jinja"], "fastmnist.report": ["*.jinja"]},
    entry_points={"console_scripts": ["fastmnist = fastmnist.cli.main:main"]},
    install_requires=[
        "jinja2>=3.1",
        "joblib>=1.3",
        "jsonargparse[signatures]>=4.50",
        "matplotlib>=3.8",
        "numba>=0.60",
        "numpy>=1.26",
        "pillow>=10",
        "platformdirs>=4",
        "psutil>=5.9",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4.3",
        "scikit-learn>=1.4",
        "scipy>=1.11",
        "torch>=2.6",
        "torchvision>=0.21",
    ],
    extras_require={
        "test": TEST,
        "ffcv": FFCV,
        "peers": PEERS,
        "peers-streaming": PEERS_STREAMING,
        "tensorboard": TENSORBOARD,
        "export": EXPORT,
        "notebook": NOTEBOOK,
        "dev": [*TEST, "import-linter>=2", "mypy>=1.11", "ruff>=0.6", "types-PyYAML"],
    },
)
