"""The package as it is imported: what it names, and what it leaves unloaded."""

import subprocess
import sys
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
import yaml

import fastmnist

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numba", "numpy", "matplotlib", "sklearn")


HELP = "from fastmnist.cli.main import main\ntry: main({})\nexcept SystemExit as end: assert end.code == 0"


@pytest.mark.parametrize("code", ["import fastmnist", HELP.format(["--help"]), HELP.format(["train", "--help"])])
def test_import_and_help_load_nothing_heavy(code: str) -> None:
    check = f"import sys\n{code}\nloaded = [m for m in {HEAVY} if m in sys.modules]\nassert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, stdout=subprocess.DEVNULL)


def test_every_public_name_is_there() -> None:
    for name in fastmnist.__all__:
        assert getattr(fastmnist, name) is not None
    assert set(dir(fastmnist)) >= {"ConfigError", "DataError", "FastmnistError", "Loader", "train", "write_beton"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = fastmnist.nothing


def test_version_is_the_installed_one() -> None:
    assert fastmnist.__version__ == version("fastmnist")


def test_the_citation_is_of_this_version_and_repository() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == fastmnist.__version__
    assert cited["repository-code"] == metadata("fastmnist")["Home-page"]
    assert f'license="{cited["license"]}"' in (ROOT / "setup.py").read_text()


def test_module_runs_like_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fastmnist", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["fastmnist", fastmnist.__version__]
