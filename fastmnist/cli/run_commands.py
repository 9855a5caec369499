"""Commands for data and runs: compile, verify, train, evaluate, predict, export and demo."""

from __future__ import annotations

import time
from typing import Any, Optional

from fastmnist.cli.parser import (
    INTERRUPTED,
    Parser,
    add_data_flags,
    add_image_size,
    add_run_flags,
    configure,
    given_settings,
    new_parser,
)
from fastmnist.config import FOLDERS
from fastmnist.files import write_json

# ruff: noqa: UP045  # jsonargparse reads these types on Python 3.10 too


def compile_parser() -> Parser:
    parser = new_parser("Compile a dataset: write <dataset>-train.beton and <dataset>-test.beton.")
    add_data_flags(parser, dataset=True)
    parser.add_argument("--output", type=Optional[str], help="Folder for the files; by default the user's cache.")
    add_image_size(parser)
    parser.add_argument(
        "--skip-broken", type=bool, default=False, help="Leave out a folder's pictures that cannot be decoded."
    )
    parser.add_argument(
        "--expand",
        type=Optional[int],
        metavar="N",
        help="Also write <dataset>-train-x<N>.beton, N deformed copies of each training image; an interrupted one is "
        "written again from its beginning.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the deformations.")
    return parser


def compile_command(options: Any) -> int:
    from fastmnist.prepare.prepare import compile_dataset
    from fastmnist.system.progress import Reporter

    reporter = Reporter()
    begun = time.perf_counter()
    files = compile_dataset(
        options.dataset,
        options.data_dir,
        options.output,
        progress=reporter.writing,
        expand=options.expand,
        seed=options.seed,
        image_size=options.image_size,
        skip_broken=options.skip_broken,
    )
    seconds = time.perf_counter() - begun
    for file in files:
        reporter.say(f"{file.path}: {file.samples:,} samples, {file.status}")
        if file.note:
            reporter.say(file.note)
    content = [{"path": str(f.path), "split": f.split, "samples": f.samples, "status": f.status} for f in files]
    write_json(options.json, {"dataset": options.dataset, "files": content, "seconds": seconds})
    return 0


def verify_parser() -> Parser:
    parser = new_parser("Verify a compiled file: header, counts, every checksum.", writes_json=False)
    parser.add_argument("file", type=str, help="The .beton file.")
    return parser


def verify_command(options: Any) -> int:
    from fastmnist.beton.reader import Beton

    with Beton(options.file) as file:
        print(f"{options.file}: {file.verify_content()}")
    return 0


def train_parser() -> Parser:
    parser = new_parser("Train a model: compile the data if needed, train, evaluate, draw, write the run's folder.")
    parser.add_argument("--resume", type=Optional[str], metavar="DIR", help="Continue the stopped run in DIR.")
    parser.add_argument(
        "--watch", action="store_true", help="Measure each step: watch.json and watch.png say what limits the run."
    )
    add_run_flags(parser)
    return parser


def train_command(options: Any) -> int:
    from fastmnist.runs.train import resume, train
    from fastmnist.system.processes import rank
    from fastmnist.system.progress import Reporter
    from fastmnist.training.run_folder import continues

    if options.resume is not None:
        result = resume(options.resume, given_settings(options), started=options.started, watch=options.watch)
    elif continues(options.out):
        given = {name: value for name, value in given_settings(options).items() if name not in FOLDERS}
        result = resume(options.out, given, started=options.started, watch=options.watch)
    else:
        config, preset = configure(options)
        reporter = Reporter(config.quiet, silent=rank() > 0)
        if preset != "none":
            reporter.say(f"preset {preset} (--preset none turns it off, any flag overrides it)")
        result = train(config, reporter=reporter, started=options.started, watch=options.watch)
    if rank():
        return 0
    write_json(options.json, result.summary | {"folder": str(result.folder)})
    return INTERRUPTED if result.interrupted else 0


def evaluate_parser() -> Parser:
    parser = new_parser("Evaluate a run on its test set: accuracy, per class, confusion matrix.")
    parser.add_argument("run", type=str, help="The run's folder.")
    add_data_flags(parser, dataset=False)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda and so on.")
    return parser


def evaluate_command(options: Any) -> int:
    from rich.console import Console

    from fastmnist.inference.predict import evaluate
    from fastmnist.report.tables import evaluation_tables
    from fastmnist.system.processes import rank

    result, names = evaluate(options.run, data_dir=options.data_dir, device=options.device)
    if rank():
        return 0
    console = Console(highlight=False)
    for table in evaluation_tables(result.confusion(), names):
        console.print(table)
    console.print(f"Test accuracy {result.accuracy:.2%} ({result.mistakes:,} of {len(result.labels):,} wrong)")
    write_json(options.json, result.to_dict(names))
    return 0


def predict_parser() -> Parser:
    parser = new_parser("Predict what is on pictures: label and probabilities for any PNG or JPEG.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Pictures of any size and colour.")
    return parser


def predict_command(options: Any) -> int:
    from fastmnist.inference.predict import predict

    predictions = predict(options.run, options.images)
    for prediction in predictions:
        ranked = ", ".join(f"{name} {share:.1%}" for name, share in prediction.ranked()[:3])
        print(f"{prediction.path}: {prediction.label}  ({ranked})")
    write_json(
        options.json,
        [{"path": str(p.path), "label": p.label, "probabilities": dict(p.ranked())} for p in predictions],
    )
    return 0


def export_parser() -> Parser:
    parser = new_parser("Export a run's model: ONNX or TorchScript, checked against the original.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("--format", type=str, default="onnx", help="onnx or torchscript.")
    parser.add_argument("--output", type=Optional[str], metavar="FILE", help="File to write; by default in the run.")
    add_data_flags(parser, dataset=False)
    return parser


def export_command(options: Any) -> int:
    from fastmnist.inference.export import export

    exported = export(options.run, options.format, options.output, data_dir=options.data_dir)
    print(
        f"{exported.path}: {exported.format}, the same predictions as the original on {exported.images:,} test images "
        f"(test accuracy {exported.test_accuracy:.2%}), logits within {exported.largest_difference:.1g}"
    )
    write_json(options.json, exported.to_dict())
    return 0


def demo_parser() -> Parser:
    parser = new_parser(
        "Demonstrate a run's model: draw a digit on a local page and see the prediction.", writes_json=False
    )
    parser.add_argument("run", type=Optional[str], nargs="?", help="The run's folder; by default the newest in runs/.")
    parser.add_argument("--port", type=int, default=0, help="Port on 127.0.0.1; 0 takes a free one.")
    parser.add_argument("--browser", type=bool, default=True, help="Open the page in the browser.")
    parser.add_argument(
        "--share-html",
        type=Optional[str],
        metavar="FILE",
        help="Write page and model as one file, which needs neither server nor network, instead of serving them.",
    )
    parser.add_argument(
        "--onnxruntime-web",
        type=Optional[str],
        metavar="DIR",
        help="The npm package's folder dist, for --share-html; by default npm downloads it once.",
    )
    add_data_flags(parser, dataset=False)
    return parser


def demo_command(options: Any) -> int:
    import webbrowser
    from pathlib import Path
    from threading import Event

    from fastmnist.inference.demo import latest_run, serving

    run = Path(options.run) if options.run is not None else latest_run()
    if options.share_html is not None:
        from fastmnist.inference.share_html import share_html

        shared = share_html(run, options.share_html, runtime=options.onnxruntime_web, data_dir=options.data_dir)
        print(
            f"{shared.path}: {shared.bytes / 1e6:.1f} MB, probabilities within {shared.largest_difference:.1g} of the "
            f"original's on {shared.images:,} test images"
        )
        return 0
    with serving(run, options.port) as address:
        try:  # Ctrl-C is the usual end as soon as the line below says so
            print(f"{run} reads what you draw on {address} (Ctrl-C ends it)", flush=True)
            if options.browser:
                webbrowser.open(address)
            Event().wait()
        except KeyboardInterrupt:
            print()
    return 0
