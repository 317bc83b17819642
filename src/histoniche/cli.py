"""Command line: ``histoniche demo | doctor | embed | distill | predict | seg``.

Thin over the public functions. Heavy modules are imported inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _cli_seg
from ._settings import settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from spatialdata import SpatialData

# What a wrong input or a missing piece raises; anything else is a defect of the package and keeps its traceback.
_USER_ERRORS = (FloatingPointError, ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError)
_DEMO_ENCODER = "efficientnet-lite0"
_DEMO_FILES = {"tissue": "tissue.zarr", "model": "model", "map": "niche_map.png"}
_DOCTOR_PACKAGES = (
    "anndata",
    "spatialdata",
    "scanpy",
    "squidpy",
    "scvi-tools",
    "torch",
    "timm",
    "lightning",
    "zarr",
    "dask",
    "pandas",
    "numpy",
    "igraph",
    "huggingface-hub",
)


_SHOWN_FIGURES = ("ari", "ari_low", "ari_high", "nmi", "jsd", "ari_gain", "effective_niches", "fit_s")


class _Clock:
    """Prints short stage lines with the time since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, stage: str) -> None:
        print(f"[{time.perf_counter() - self.start:6.1f} s] {stage}", flush=True)


# ------------------------------------------------------------------------------------------------------------ parser
def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="histoniche", description="Molecular tissue niches from H&E alone: distil, predict, evaluate."
    )
    parser.add_argument("--version", action="version", version=f"histoniche {version('histoniche')}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the whole traceback of an error")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", parents=[common], help="the whole way on a synthetic tissue, without a download")
    demo.add_argument("--output", type=Path, default=Path("histoniche_demo"), help="folder to write (%(default)s)")
    demo.add_argument("--n-cells", type=int, default=6000, help="cells of the synthetic tissue (%(default)s)")
    demo.add_argument("--n-niches", type=int, default=5, help="niches, of the tissue and of the models (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    demo.add_argument("--overwrite", action="store_true", help="replace what an earlier demo wrote to the folder")
    demo.set_defaults(run=_demo)

    doctor = commands.add_parser("doctor", parents=[common], help="versions, device, encoders, settings")
    doctor.set_defaults(run=_doctor)

    embed = commands.add_parser("embed", parents=[common], help="histology embedding of every cell")
    _add_paths(embed)
    _add_image_options(embed)
    _add_encoder_options(embed)
    embed.set_defaults(run=_embed)

    distill = commands.add_parser(
        "distill", parents=[common], help="train a student on a slide with transcripts and H&E"
    )
    _add_paths(distill)
    _add_image_options(distill)
    _add_encoder_options(distill)
    distill.add_argument("--n-niches", type=int, default=10, help="number of niches (%(default)s)")
    distill.add_argument("--model-dir", type=Path, help="folder for the student (beside OUTPUT: <name>_model)")
    distill.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    distill.set_defaults(run=_distill)

    predict = commands.add_parser("predict", parents=[common], help="niches from an image and cell positions alone")
    _add_paths(predict)
    predict.add_argument("model", type=Path, metavar="MODEL", help="model folder that `histoniche distill` wrote")
    _add_image_options(predict)
    predict.set_defaults(run=_predict)

    _cli_seg.add_parser(commands, common)
    return parser


def _add_paths(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", type=Path, metavar="INPUT", help="SpatialData zarr to read; never changed")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="SpatialData zarr to write; must not exist yet")


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--table-key", help="table of the cells (needed where there are several)")
    parser.add_argument("--image-key", help="H&E image (needed where there are several)")


def _add_encoder_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--encoder", default="uni2-h", help="see `histoniche doctor` (%(default)s)")
    parser.add_argument("--mode", choices=("crop", "dense"), default="crop", help="(%(default)s)")
    parser.add_argument(
        "--symmetries", type=int, choices=(1, 2, 4, 8), default=1,
        help="mirror images and turns that features are the mean over (%(default)s)",
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the name of the program; default: those of the process.

    Returns
    -------
    Exit status: 0, or 2 where the input was at fault, or 130 where the user stopped it.
    """
    args = _parser().parse_args(argv)
    progress, settings.progress = settings.progress, settings.progress and not args.quiet
    try:
        args.run(args)
    except _USER_ERRORS as error:
        if args.debug:
            raise
        print(f"histoniche: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("histoniche: stopped", file=sys.stderr)
        return 130
    finally:
        settings.progress = progress
    return 0


def _one_line(error: BaseException) -> str:
    # str(KeyError) is the repr of its message, and messages of libraries have line breaks.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


# -------------------------------------------------------------------------------------------------------------- demo
def _demo(args: argparse.Namespace) -> None:
    import histoniche as hn

    clock = _Clock()
    out = _prepare_demo_folder(args.output, overwrite=args.overwrite)
    print("Demo on a *synthetic tissue*: its figures say that the installation works, not how well the method does.")
    clock(f"synthetic tissue: {args.n_cells} cells, {args.n_niches} niches, H&E-like image, seed {args.seed}")
    sdata = hn.datasets.synthetic_tissue(n_cells=args.n_cells, n_niches=args.n_niches, seed=args.seed)
    clock("spatial hold-out: four strips, the second is the test strip")
    hn.pp.spatial_holdout(sdata)
    clock(f"teacher (molecules), histology embedding ({_DEMO_ENCODER}, dense) and student")
    hn.tl.distill_niches(
        sdata,
        n_niches=args.n_niches,
        encoder=_DEMO_ENCODER,
        mode="dense",
        model_dir=out["model"],
        seed=args.seed,
    )
    clock("evaluation on the test strip: student and baselines against the teacher")
    hn.tl.evaluate_niches(sdata, cell_type_key="cell_type")
    print(_table_text(_table(sdata, None).uns["niche_evaluation"]))
    clock("niche map")
    hn.pl.niche_map(sdata, save=out["map"])
    clock("writing the SpatialData object")
    sdata.write(out["tissue"])
    clock("done. Files (of a synthetic tissue):")
    for name, what in (
        ("tissue", "SpatialData: image, cells, niches of teacher and student"),
        ("model", "student: config.json, model.safetensors, README.md"),
        ("map", "niche map of teacher and student"),
    ):
        print(f"  {out[name]}  {what}")


def _prepare_demo_folder(folder: Path, *, overwrite: bool) -> dict[str, Path]:
    """Paths that the demo writes; only those are replaced, never what else lies in the folder."""
    out = {name: folder / file for name, file in _DEMO_FILES.items()}
    existing = [path for path in out.values() if path.exists()]
    if existing and not overwrite:
        msg = f"{existing[0]} exists already: pass --overwrite to replace it, or another --output."
        raise FileExistsError(msg)
    for path in existing:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    return out


def _table_text(frame: pd.DataFrame) -> str:
    frame = frame[[column for column in _SHOWN_FIGURES if column in frame]]
    return frame.to_string(float_format=lambda value: f"{value:.3f}", na_rep="-")


# ------------------------------------------------------------------------------------------------------------ doctor
def _doctor(args: argparse.Namespace) -> None:  # noqa: ARG001 - every command takes the arguments
    import torch

    import histoniche as hn

    print("Versions")
    print(f"  {'python':<18}{sys.version.split()[0]}")
    for name in ("histoniche", *_DOCTOR_PACKAGES):
        print(f"  {name:<18}{_version_of(name)}")
    print("Device")
    print(f"  {_device_line(torch)}")
    print("Settings")
    for field in dataclasses.fields(settings):
        print(f"  {field.name:<18}{getattr(settings, field.name)}")
    print("Encoders")
    print("  " + hn.encoders.list_encoders().to_string().replace("\n", "\n  "))
    print("Hugging Face")
    print(f"  {_hub_line()}")


def _version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device_line(torch: Any) -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return f"cuda: {', '.join(names)}"
    if torch.backends.mps.is_available():
        return "mps: Apple GPU"
    return f"cpu: {torch.get_num_threads()} threads"


def _hub_line() -> str:
    """Whether gated encoders can be asked for; read from this machine, nothing is sent."""
    from huggingface_hub import get_token

    if get_token():
        return "a token is set; a gated encoder also needs its terms accepted on its page"
    return "no token: gated encoders (such as uni2-h) cannot be downloaded; run `hf auth login` after access is granted"


# ---------------------------------------------------------------------------------------------------------- commands
def _embed(args: argparse.Namespace) -> None:
    import histoniche as hn

    sdata = _read(args.input, args.output)
    hn.tl.histology_embedding(
        sdata, image_key=args.image_key, encoder=args.encoder, mode=args.mode, symmetries=args.symmetries,
        table_key=args.table_key,
    )  # fmt: skip
    _write(sdata, args.output)


def _distill(args: argparse.Namespace) -> None:
    model_dir = args.model_dir or args.output.with_name(f"{args.output.stem}_model")
    if model_dir.exists():
        msg = f"The model folder {model_dir} exists already: name another with --model-dir."
        raise FileExistsError(msg)
    import histoniche as hn

    sdata = _read(args.input, args.output)
    hn.tl.distill_niches(
        sdata,
        n_niches=args.n_niches,
        image_key=args.image_key,
        encoder=args.encoder,
        mode=args.mode,
        symmetries=args.symmetries,
        model_dir=model_dir,
        seed=args.seed,
        table_key=args.table_key,
    )
    print(f"student: {model_dir}")
    _write(sdata, args.output)


def _predict(args: argparse.Namespace) -> None:
    if not args.model.is_dir():
        msg = f"There is no model folder {args.model}: `histoniche distill` writes one."
        raise FileNotFoundError(msg)
    import histoniche as hn

    sdata = _read(args.input, args.output)
    hn.tl.predict_niches(sdata, args.model, image_key=args.image_key, table_key=args.table_key)
    counts = _table(sdata, args.table_key).obs["niche"].value_counts(sort=False)
    print("cells per niche: " + ", ".join(f"{niche}: {n}" for niche, n in counts.items()))
    _write(sdata, args.output)


def _read(path: Path, output: Path) -> SpatialData:
    # The output is checked before hours of work, not after.
    if output.exists():
        msg = f"{output} exists already: name another output; nothing is overwritten."
        raise FileExistsError(msg)
    if not output.parent.is_dir():
        msg = f"There is no folder {output.parent} to write {output.name} into: make it first."
        raise FileNotFoundError(msg)
    if not path.exists():
        msg = f"There is no {path}: name a SpatialData zarr."
        raise FileNotFoundError(msg)
    from spatialdata import read_zarr

    return read_zarr(path)


def _write(sdata: SpatialData, path: Path) -> None:
    sdata.write(path)
    print(f"wrote {path}")


def _table(sdata: SpatialData, table_key: str | None) -> AnnData:
    return sdata.tables[table_key] if table_key else next(iter(sdata.tables.values()))


if __name__ == "__main__":
    sys.exit(main())
