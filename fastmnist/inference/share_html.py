"""The demo as one HTML file: the page, the model, and onnxruntime-web; it needs no server and no network."""

from __future__ import annotations

import base64
import gzip
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax
from torch import nn

from fastmnist.errors import FastmnistError
from fastmnist.files import replacing
from fastmnist.inference import picture
from fastmnist.inference.demo import render_page
from fastmnist.inference.export import Classifier, logits_of_both, open_onnx, require_packages, write_onnx
from fastmnist.inference.onnxruntime_web import load_runtime
from fastmnist.inference.predict import PictureModel, open_test_set
from fastmnist.training.checkpoint import ModelCard
from fastmnist.training.live_taps import use_live_taps

TOLERANCE = 0.01  # of probabilities: the page shows per cent
MIN_HALVED = 256  # numbers in a tensor that becomes 16-bit; smaller ones (biases) stay as they are
CONSTANTS = {name: getattr(picture, name) for name in ("EDGE", "CUT", "SPECK", "MIN_STROKE", "BOX_SHARE")}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'wasm-unsafe-eval' data:"


@dataclass(frozen=True)
class Shared:
    """images: size of the test set that page and original saw. largest_difference: between their probabilities."""

    path: Path
    bytes: int
    images: int
    largest_difference: float


def share_html(
    run: str | Path,
    output: str | Path,
    *,
    runtime: str | Path | None = None,
    data_dir: str | None = None,
    cache_dir: str | None = None,
) -> Shared:
    """Writes the page; it opens from a disk or any server, in browsers with DecompressionStream (tested: Chromium).

    Its model is the run's with the larger weights as 16-bit floats and dead taps zero, so that a ResNet-18 packs to a
    fifth of its bytes.

    Args:
        run: the run's folder.
        output: the HTML file.
        runtime: folder with onnxruntime-web's dist files; by default npm fetches them once.
        data_dir, cache_dir: where the test set is; by default as in the run.

    Raises:
        ConfigError: onnx, onnxruntime or npm is missing, or the model does not take square grey images.
        DataError: the run has no weights.
        FastmnistError: the page's model differs from the original.
    """
    require_packages("onnx", "onnxruntime", by="--share-html")
    path, picture_model = Path(output), PictureModel(Path(run), drawn=True)
    model, card = picture_model.model, picture_model.card
    web = load_runtime(runtime)
    original = Classifier(model, card)
    lean = Classifier(_without_dead_taps(model, card), card)
    with tempfile.TemporaryDirectory() as scratch, open_test_set(Path(run), card, data_dir, cache_dir) as test:
        written = Path(scratch) / "model.onnx"
        write_onnx(lean, card, written)
        _halve(written)
        difference = 0.0
        for _, expected, actual in logits_of_both(original, open_onnx(written), test):
            difference = max(difference, float(np.abs(softmax(expected, 1) - softmax(actual, 1)).max()))
        if not difference <= TOLERANCE:
            raise FastmnistError(
                f"{path}: with 16-bit weights the probabilities differ by up to {difference:.2g} from the original's "
                f"on the test set (allowed {TOLERANCE}), so it was not written; fastmnist demo shows the original"
            )
        shared = {
            "runtime": web.script,
            "glue": base64.b64encode(web.glue).decode(),
            "wasm": _packed(web.wasm),
            "model": _packed(written.read_bytes()),
        }
        images = len(test)
    content = render_page(card, "demo_page.js.jinja", shared=shared, policy=POLICY, constants=CONSTANTS)
    with replacing(path, "name another file with --share-html") as file:
        file.write(content)
    return Shared(path, len(content), images, difference)


def _without_dead_taps(model: nn.Module, card: ModelCard) -> nn.Module:
    """The same function, with zeros for the taps that only multiply zeros: they pack to nothing."""
    live, whole = card.build(), card.build()
    live.load_state_dict(model.state_dict())
    height, width, channels = card.image_shape
    use_live_taps(live, (height, width, channels))
    whole.load_state_dict(live.state_dict())
    return whole


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, mtime=0)).decode()


def _halve(path: Path) -> None:
    """Stores the larger weights of an ONNX file as 16-bit floats, each with a cast back to 32."""
    import onnx

    model = onnx.load(str(path))
    casts = []
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size < MIN_HALVED:
            continue
        name, half = tensor.name, f"{tensor.name}.half"
        tensor.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float16), half))
        casts.append(onnx.helper.make_node("Cast", [half], [name], to=onnx.TensorProto.FLOAT))
    for cast in reversed(casts):
        model.graph.node.insert(0, cast)
    onnx.save(model, str(path))
    onnx.checker.check_model(str(path), full_check=True)
