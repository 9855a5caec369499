"""The subcommands about data and runs: compile, verify, train, evaluate and predict."""

from __future__ import annotations

import time
from typing import Any, Optional

from fastmnist.cli.parser import (
    INTERRUPTED,
    Parser,
    add_data_flags,
    add_run_flags,
    config_of,
    new_parser,
    run_settings,
    write_json,
)

# ruff: noqa: UP045  # jsonargparse reads these types on Python 3.10 too


def describe_compile() -> Parser:
    parser = new_parser("Compile a dataset: source to <dataset>-train.beton and <dataset>-test.beton.")
    add_data_flags(parser, dataset=True)
    parser.add_argument("--output", type=Optional[str], help="Folder for the files; by default the user's cache.")
    parser.add_argument(
        "--expand",
        type=Optional[int],
        metavar="N",
        help="Also write <dataset>-train-x<N>.beton, N deformed copies of each training image; once interrupted, "
        "it is written from its beginning.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Of the copies' deformations.")
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
        progress=reporter.compiling,
        expand=options.expand,
        seed=options.seed,
    )
    seconds = time.perf_counter() - begun
    for file in files:
        reporter.say(f"{file.path}: {file.samples:,} samples, {file.status}")
    content = [{"path": str(f.path), "split": f.split, "samples": f.samples, "status": f.status} for f in files]
    write_json(options.json, {"dataset": options.dataset, "files": content, "seconds": seconds})
    return 0


def describe_verify() -> Parser:
    parser = new_parser("Verify a compiled file: header, counts, every checksum.", writes_json=False)
    parser.add_argument("file", type=str, help="The .beton file.")
    return parser


def verify_command(options: Any) -> int:
    from fastmnist.beton.reader import Beton

    with Beton(options.file) as file:
        print(f"{options.file}: {file.verify_content()}")
    return 0


def describe_train() -> Parser:
    parser = new_parser("Train a model: compile the data where needed, train, evaluate, draw, write the run's folder.")
    parser.add_argument(
        "--resume", type=Optional[str], metavar="DIR", help="Go on with the run in DIR that was stopped."
    )
    add_run_flags(parser)
    return parser


def train_command(options: Any) -> int:
    if options.resume is None:
        from fastmnist.runs.train import train

        config, preset = config_of(options)
        if preset != "none" and not config.quiet:
            print(f"preset {preset} (--preset none, or any flag, for other settings)")
        result = train(config, started=options.started)
    else:
        from fastmnist.runs.train import resume

        # What was not given keeps the run's own value, and is no change.
        result = resume(options.resume, run_settings(options), started=options.started)
    write_json(options.json, result.summary | {"folder": str(result.folder)})
    return INTERRUPTED if result.interrupted else 0


def describe_evaluate() -> Parser:
    parser = new_parser("Evaluate a run on its test set: accuracy, per class, confusion matrix.")
    parser.add_argument("run", type=str, help="The run's folder.")
    add_data_flags(parser, dataset=False)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda and so on.")
    return parser


def evaluate_command(options: Any) -> int:
    from rich.console import Console

    from fastmnist.inference.predict import evaluate
    from fastmnist.report.tables import evaluation_tables

    result, names = evaluate(options.run, data_dir=options.data_dir, device=options.device)
    console = Console(highlight=False)
    for table in evaluation_tables(result.confusion(), names):
        console.print(table)
    console.print(f"Test accuracy {result.accuracy:.2%} ({result.mistakes:,} of {len(result.labels):,} wrong)")
    write_json(options.json, result.to_dict(names))
    return 0


def describe_predict() -> Parser:
    parser = new_parser("Predict what is on pictures: label and probabilities for any PNG or JPEG of a digit.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("images", type=str, nargs="+", metavar="IMAGE", help="Pictures, of any size and colour.")
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


def describe_export() -> Parser:
    parser = new_parser("Export a run's model: ONNX, TorchScript or weights, checked against the original.")
    parser.add_argument("run", type=str, help="The run's folder.")
    parser.add_argument("--format", type=str, default="onnx", help="onnx, torchscript or safetensors.")
    parser.add_argument("--output", type=Optional[str], metavar="FILE", help="File to write; by default in the run.")
    add_data_flags(parser, dataset=False)
    return parser


def export_command(options: Any) -> int:
    from fastmnist.inference.export import export

    found = export(options.run, options.format, options.output, data_dir=options.data_dir)
    print(
        f"{found.path}: {found.format}, the same predictions as the original on {found.images:,} test images "
        f"(test accuracy {found.test_accuracy:.2%}), logits within {found.largest_difference:.1g}"
    )
    write_json(options.json, found.to_dict())
    return 0


def describe_demo() -> Parser:
    parser = new_parser(
        "Draw a digit on a page of this machine and see what a run's model makes of it.", writes_json=False
    )
    parser.add_argument("run", type=Optional[str], nargs="?", help="The run's folder; by default the newest in runs/.")
    parser.add_argument("--port", type=int, default=0, help="Of 127.0.0.1; by default a free one.")
    parser.add_argument("--browser", type=bool, default=True, help="Open the page in the browser.")
    parser.add_argument(
        "--share-html",
        type=Optional[str],
        metavar="FILE",
        help="Write the page with the model in it as one file, which needs no server and no network, and end.",
    )
    parser.add_argument(
        "--onnxruntime-web",
        type=Optional[str],
        metavar="DIR",
        help="Folder dist of that npm package, for --share-html; by default npm fetches it once.",
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

        found = share_html(run, options.share_html, runtime=options.onnxruntime_web, data_dir=options.data_dir)
        print(
            f"{found.path}: {found.bytes / 1e6:.1f} MB, probabilities within {found.largest_difference:.1g} of the "
            f"original's on {found.images:,} test images"
        )
        return 0
    with serving(run, options.port) as address:
        try:  # from the line that promises it on, Ctrl-C is the usual end
            print(f"{run} reads what you draw on {address} (Ctrl-C ends it)", flush=True)
            if options.browser:
                webbrowser.open(address)
            Event().wait()
        except KeyboardInterrupt:
            print()
    return 0
