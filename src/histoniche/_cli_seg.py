"""Command line of segmentation: ``histoniche seg distill | predict | evaluate``.

Thin over :mod:`histoniche.seg`, as the other commands are over the rest.
"""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    import numpy as np
    import pandas as pd

    from .seg import Field, Segmenter
    from .seg.teachers import PromptedTeacher

_TEACHERS = ("litemedsam", "vit_b", "vit_l", "vit_h")
# What is measured of masks; the rest counts objects.
_FIGURES_OF_MASKS = ("dice", "hausdorff95", "boundary_f", "missed")
_TILE, _OVERLAP = 1024, 128
"""Images up to this many px wide are predicted as they are, larger ones in tiles that overlap."""


# ------------------------------------------------------------------------------------------------------------ parser
def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add the command ``seg`` and what lies below it.

    Parameters
    ----------
    commands
        What ``ArgumentParser.add_subparsers`` returned.
    common
        Options that every command has.
    """
    parser = commands.add_parser("seg", help="small segmentation students from few labels: distill, predict, evaluate")
    below = parser.add_subparsers(dest="seg_command", required=True, metavar="COMMAND")
    _add_distill(below, common)

    predict = below.add_parser("predict", parents=[common], help="apply a student to a folder of images")
    predict.add_argument("model", type=Path, metavar="MODEL", help="student that `histoniche seg distill` wrote")
    predict.add_argument("images", type=Path, metavar="IMAGES", help="folder of images (or of a folder images/)")
    predict.add_argument(
        "output", type=Path, metavar="OUTPUT", help="folder for label images, tif, of the same names; new or empty"
    )
    predict.add_argument("--mask", action="store_true", help="write masks of 0 and 255 instead of one number an object")
    _add_scale(predict, "must be given where the student was trained with one")
    predict.set_defaults(run=_predict)

    evaluate = below.add_parser("evaluate", parents=[common], help="measure label images against the truth")
    evaluate.add_argument("predicted", type=Path, metavar="PREDICTED", help="folder of label images")
    evaluate.add_argument("truth", type=Path, metavar="TRUTH", help="folder of true label images of the same names")
    evaluate.add_argument("--mask", action="store_true", help="measure foregrounds only: labels are masks of one class")
    evaluate.add_argument("--csv", type=Path, metavar="FILE", help="file for the table; must not exist yet")
    _add_scale(evaluate, "without, distances are in px")
    evaluate.set_defaults(run=_evaluate)


def _add_distill(below: Any, common: argparse.ArgumentParser) -> None:
    parser = below.add_parser(
        "distill",
        parents=[common],
        help="make a student for a task of which few images are labelled",
        description=(
            "Make a small student for a task of which few images are labelled: a large teacher is adapted to it, and the "
            "student learns from the teacher on all images, then from the labels. The same command goes on after an "
            "interruption. Images and label images are png, tif or npy, and belong together by name."
        ),
    )
    parser.add_argument(
        "images", type=Path, metavar="IMAGES",
        help="folder of images (or of a folder images/); those without a label image are used without one",
    )  # fmt: skip
    parser.add_argument(
        "output", type=Path, metavar="OUTPUT", help="folder for all stages; OUTPUT/student is the result"
    )
    parser.add_argument("--labels", type=Path, metavar="FOLDER", help="folder of label images (IMAGES/labels)")
    parser.add_argument("--mask", action="store_true", help="labels are masks of one class, not one number an object")
    parser.add_argument("--unlabelled", type=Path, metavar="FOLDER", help="folder of more images without labels")
    parser.add_argument(
        "--held-out", type=Path, metavar="FOLDER", help="images to measure on later, refused among the others"
    )
    parser.add_argument(
        "--channels", nargs="+", metavar="NAME", help="names of the channels (one, or red green blue, as images tell)"
    )
    _add_scale(parser, "of all images")
    parser.add_argument(
        "--student", default="vit-tiny", help="see `histoniche.seg.list_students`, or a timm encoder (%(default)s)"
    )
    parser.add_argument(
        "--student-weights",
        type=Path,
        metavar="FILE",
        help="ImageNet weights of the student's encoder, not from the hub",
    )
    parser.add_argument("--no-pretrained", action="store_true", help="start the student from random weights")
    parser.add_argument(
        "--teacher", choices=_TEACHERS, default="litemedsam", help="vit_*: SAM, for a GPU (%(default)s, comes with seg)"
    )
    parser.add_argument("--teacher-weights", type=Path, metavar="FOLDER", help="SAM's weights, not from the hub")
    parser.add_argument(
        "--n-synthetic", type=int, default=0, help="synthetic images to learn from besides, 0 to 3000 (%(default)s)"
    )
    parser.add_argument("--patch-px", type=int, default=128, help="width of patches, a multiple of 32 (%(default)s)")
    parser.add_argument(
        "--steps", type=int, metavar="N", help="steps of the student, on the teacher and again on labels (1000)"
    )
    parser.add_argument(
        "--teacher-steps", type=int, metavar="N",
        help="steps of the teacher's adaptation (200); 0 trains its decoder only, much faster without a GPU",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--onnx", action="store_true", help="write OUTPUT/student.onnx too")
    parser.set_defaults(run=_distill)


def _add_scale(parser: argparse.ArgumentParser, note: str) -> None:
    parser.add_argument("--um-per-px", type=float, metavar="X", help=f"size of a pixel in um ({note})")


# ----------------------------------------------------------------------------------------------------------- distill
def _distill(args: argparse.Namespace) -> None:
    _check_stage_folder(args.output)
    if args.teacher_weights is not None and args.teacher == "litemedsam":
        msg = "--teacher-weights are those of SAM, but --teacher is litemedsam, whose weights come with it: name vit_b, vit_l or vit_h."
        raise ValueError(msg)
    if args.student_weights is not None and args.no_pretrained:
        msg = "--student-weights and --no-pretrained exclude each other."
        raise ValueError(msg)
    import histoniche as hn

    if args.onnx:
        from .seg._access import need_package

        for package in ("onnx", "onnxruntime"):
            need_package(package, package, "--onnx")
    labelled, unlabelled, held_out = _fields(args)
    channels = list(labelled[0].channels)
    print(
        f"{len(labelled)} labelled and {len(unlabelled)} unlabelled images, channels {', '.join(channels)}; "
        f"teacher {args.teacher}, student {args.student}",
        flush=True,
    )
    _check_student(args, channels)
    steps = {} if args.steps is None else {"n_steps": args.steps}
    start = {} if args.student_weights is None else {"weights": str(args.student_weights)}
    student = hn.seg.task_specific_distill(
        labelled,
        teacher=_teacher(args, channels),
        folder=args.output,
        unlabelled=unlabelled,
        held_out=held_out,
        channel=channels,
        student=args.student,
        pretrained=not args.no_pretrained,
        n_synthetic=args.n_synthetic,
        patch_px=args.patch_px,
        adaptation=None if args.teacher_steps is None else {"n_steps": args.teacher_steps},
        distillation={**steps, **start} or None,
        finetuning=steps or None,
        seed=args.seed,
    )
    print(f"student: {args.output / 'student'}")
    if args.onnx:
        from .seg._students import is_plain_vit

        size = args.patch_px if is_plain_vit(args.student) else None  # a ViT is bound to the size of its export
        print(f"onnx: {hn.seg.export_onnx(student, args.output / 'student.onnx', size=size)}")
    more = " --mask" * args.mask + (f" --um-per-px {args.um_per_px:g}" if args.um_per_px is not None else "")
    print(f"next: histoniche seg predict {args.output / 'student'} IMAGES OUTPUT{more}")
    print(f"      histoniche seg evaluate OUTPUT TRUTH{more}  (images that it never saw)")


def _check_stage_folder(folder: Path) -> None:
    """Refuse a folder of something else; one that an interrupted run left is gone on with."""
    if not folder.parent.is_dir():
        msg = f"There is no folder {folder.parent} to write {folder.name} into: make it first."
        raise FileNotFoundError(msg)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "tuned.json").exists():
        msg = f"{folder} holds something else than the stages of `histoniche seg distill`: name another folder."
        raise FileExistsError(msg)


def _fields(args: argparse.Namespace) -> tuple[list[Field], list[Field], list[Field]]:
    """Labelled, unlabelled and held-out fields."""
    from .seg._folders import channels_of

    labels = args.labels or args.images / "labels"
    if not labels.is_dir():
        msg = f"There is no folder {labels} of label images: name it with --labels."
        raise FileNotFoundError(msg)
    channels = args.channels or channels_of(args.images, images=_pattern(args.images))
    mine = _read(args.images, channels, args.um_per_px, labels="*", labels_path=labels, unlabelled=True, mask=args.mask)
    labelled = [item for item in mine if item.labels is not None]
    unlabelled = [item for item in mine if item.labels is None]
    if not labelled:
        msg = f"No label image in {labels} has the name of an image: nothing is labelled."
        raise ValueError(msg)
    if args.unlabelled is not None:
        unlabelled += _read(args.unlabelled, channels, args.um_per_px, labels=None)
    held_out = [] if args.held_out is None else _read(args.held_out, channels, args.um_per_px, labels=None)
    for item in [*labelled, *unlabelled]:
        if min(item.shape) < args.patch_px:
            msg = (
                f"Image {item.name!r} is {item.shape[0]} x {item.shape[1]} px, smaller than --patch-px {args.patch_px}: lower "
                "it (a multiple of 32), or leave the image out."
            )
            raise ValueError(msg)
    return labelled, unlabelled, held_out


def _read(path: Path, channels: Sequence[str] | None, um_per_px: float | None, **options: Any) -> list[Field]:
    import histoniche as hn

    return hn.seg.read_folder(path, images=_pattern(path), channels=channels, um_per_px=um_per_px, **options)


def _pattern(path: Path) -> str:
    """Where images lie: in the folder images, if there is one."""
    return "images/*" if (path / "images").is_dir() else "*"


def _check_student(args: argparse.Namespace, channels: list[str]) -> None:
    """Find out that its weights cannot be had before the teacher is adapted, not hours later."""
    if (args.output / "distilled").exists():
        return
    import histoniche as hn

    config = hn.seg.SegmenterConfig(args.student, channels)
    hn.seg.Segmenter(config, pretrained=not args.no_pretrained, weights=args.student_weights)


def _teacher(args: argparse.Namespace, channels: list[str]) -> PromptedTeacher:
    from .seg import teachers

    if args.teacher == "litemedsam":
        return teachers.LiteMedSAM(channels)
    return teachers.SAM(channels, model=args.teacher, weights=args.teacher_weights)


# ----------------------------------------------------------------------------------------------------------- predict
def _predict(args: argparse.Namespace) -> None:
    if not args.model.is_dir():
        msg = f"There is no model folder {args.model}: `histoniche seg distill` writes one, OUTPUT/student."
        raise FileNotFoundError(msg)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        msg = f"{args.output} exists already and is not empty: name another output; nothing is overwritten."
        raise FileExistsError(msg)
    if not args.output.parent.is_dir():
        msg = f"There is no folder {args.output.parent} to write {args.output.name} into: make it first."
        raise FileNotFoundError(msg)
    from tqdm.auto import tqdm

    import histoniche as hn

    from .seg._segmenter import check_scale

    model = hn.seg.Segmenter.load(args.model)
    fields = _read(args.images, model.config.channels, args.um_per_px, labels=None)
    for item in fields:
        check_scale(model.config.um_per_px, item.um_per_px, f"image {item.name!r}")
    n_objects = 0
    with _whole_folder(args.output) as folder:
        for item in tqdm(fields, "predict", disable=not hn.settings.progress):
            maps = _maps(model, item)
            labels = maps[0] > model.config.threshold if args.mask else model.instances(maps)
            n_objects += 0 if args.mask else int(labels.max())
            _write_labels(labels, folder / f"{item.name}.tif")
    what = "masks" if args.mask else f"label images with {n_objects} objects"
    print(f"wrote {len(fields)} {what} to {args.output}")


@contextmanager
def _whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write to, of which nothing is left after an error; what it holds becomes that of the path."""
    with tempfile.TemporaryDirectory(dir=path.resolve().parent, prefix=f".{path.resolve().name}-") as folder:
        made = Path(folder) / "made"
        made.mkdir()
        yield made
        if not path.exists():
            made.rename(path)
            return
        for file in made.iterdir():
            file.rename(path / file.name)


def _maps(model: Segmenter, item: Field) -> np.ndarray:
    """Maps of an image of any size, (2, y, x)."""
    if max(item.shape) <= _TILE:
        return model.predict_field(item)
    import numpy as np

    from .seg._segmenter import check_scale
    from .seg._tiled import tiled_maps

    check_scale(model.config.um_per_px, item.um_per_px, f"image {item.name!r}")
    pixels = item.read(model.config.channels)
    maps = tiled_maps(pixels, model.predict_maps, tile=_TILE, overlap=_OVERLAP, batch_size=1)
    return np.asarray(maps.compute(scheduler="synchronous"))


def _write_labels(labels: np.ndarray, path: Path) -> None:
    """Write a mask with 8 bits, numbers of objects with 16 or, where they need it, 32; the file is whole or not there."""
    import numpy as np
    import tifffile

    if labels.dtype == bool:
        stored = labels * np.uint8(255)
    else:
        stored = labels.astype(np.uint16 if labels.max() < 2**16 else np.uint32)
    beside = path.with_name(f".{path.name}.part")
    try:
        tifffile.imwrite(beside, stored, photometric="minisblack", compression="zlib")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------- evaluate
def _evaluate(args: argparse.Namespace) -> None:
    if args.csv is not None and args.csv.exists():
        msg = f"{args.csv} exists already: name another file; nothing is overwritten."
        raise FileExistsError(msg)
    if args.csv is not None and not args.csv.parent.is_dir():
        msg = f"There is no folder {args.csv.parent} to write {args.csv.name} into: make it first."
        raise FileNotFoundError(msg)
    import histoniche as hn

    from .seg._folders import label_pairs

    names, pairs = label_pairs(args.predicted, args.truth, mask=args.mask)
    scale = 1.0 if args.um_per_px is None else args.um_per_px
    table = hn.seg.metrics.evaluate(pairs, names=names, um_per_px=scale)
    if args.mask:
        table = table[list(_FIGURES_OF_MASKS)]
    print(table.to_string(float_format=lambda value: f"{value:.3f}"))
    print(_mean_line(table, "px" if args.um_per_px is None else "um"))
    if args.csv is not None:
        beside = args.csv.with_name(f".{args.csv.name}.part")
        table.to_csv(beside)
        beside.replace(args.csv)
        print(f"wrote {args.csv}")


def _mean_line(table: pd.DataFrame, unit: str) -> str:
    figures = [
        f"{name} {table[name].mean():.3f}" + f" {unit}" * (name == "hausdorff95")
        for name in table
        if not str(name).startswith("n_") and name != "missed"
    ]
    return f"mean of {len(table)} images: {', '.join(figures)}; nothing found in {int(table['missed'].sum())}"
