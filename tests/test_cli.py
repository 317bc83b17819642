from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from spatialdata import SpatialData, read_zarr
from spatialdata.models import TableModel

import histoniche as hn
from histoniche import cli


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    table = AnnData(np.ones((6, 2), dtype=np.float32), obsm={"spatial": np.arange(12.0).reshape(6, 2)})
    path = tmp_path / "in.zarr"
    SpatialData(tables={"cells": TableModel.parse(table)}).write(path)
    return path


def _record(calls: dict, name: str, effect=None):
    def function(*args, **kwargs):
        calls[name] = (args, kwargs)
        if effect:
            effect(*args, **kwargs)

    return function


def _fake_niches(sdata: SpatialData, *args, **kwargs) -> None:
    table = next(iter(sdata.tables.values()))
    table.obs["niche"] = pd.Categorical(["0", "1"] * (table.n_obs // 2), categories=["0", "1", "2"])


def test_help_needs_no_heavy_module() -> None:
    code = (
        "import sys\nfrom histoniche import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print('LOADED', *[m for m in ('torch', 'spatialdata', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED"
    for command in ("demo", "doctor", "embed", "distill", "predict"):
        assert command in done.stdout


def test_console_script_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "histoniche.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"histoniche {hn.__version__}"


def test_unknown_command_exits_2(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["nothing"])
    assert end.value.code == 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("no 'he'"), "no 'he'"),
        (ValueError("two\n  lines"), "two lines"),
        (RuntimeError(), "RuntimeError"),
        (FloatingPointError("scVI diverged"), "scVI diverged"),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, error: Exception, line: str) -> None:
    def fail(args) -> None:
        raise error

    monkeypatch.setattr(cli, "_doctor", fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == f"histoniche: error: {line}\n"
    with pytest.raises(type(error)):
        cli.main(["doctor", "--debug"])


def test_defects_keep_their_traceback(monkeypatch) -> None:
    def fail(args) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_doctor", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_quiet_is_restored(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(cli, "_doctor", lambda args: seen.append(hn.settings.progress))
    monkeypatch.setattr(hn.settings, "progress", True)
    assert cli.main(["doctor", "--quiet"]) == 0
    assert seen == [False]
    assert hn.settings.progress is True


@pytest.mark.parametrize("command", ["embed", "distill"])
def test_existing_output_is_refused_before_any_work(command: str, stored: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.zarr"
    out.mkdir()
    (out / "kept").write_text("kept")
    assert cli.main([command, str(stored), str(out)]) == 2
    assert f"{out} exists already" in capsys.readouterr().err
    assert (out / "kept").read_text() == "kept"


def test_missing_paths_are_named(stored: Path, tmp_path: Path, capsys) -> None:
    assert cli.main(["embed", str(tmp_path / "none.zarr"), str(tmp_path / "out.zarr")]) == 2
    assert "none.zarr" in capsys.readouterr().err
    assert cli.main(["embed", str(stored), str(tmp_path / "absent" / "out.zarr")]) == 2
    assert "absent" in capsys.readouterr().err
    assert cli.main(["predict", str(stored), str(tmp_path / "out.zarr"), str(tmp_path / "no_model")]) == 2
    assert "no_model" in capsys.readouterr().err


def test_embed_passes_its_options(monkeypatch, stored: Path, tmp_path: Path) -> None:
    calls: dict = {}
    monkeypatch.setattr(hn, "tl", SimpleNamespace(histology_embedding=_record(calls, "embed")), raising=False)
    out = tmp_path / "out.zarr"
    command = ["embed", str(stored), str(out), "--encoder", "efficientnet-lite0", "--mode", "dense"]
    assert cli.main([*command, "--symmetries", "4", "--image-key", "he", "--table-key", "cells"]) == 0
    (sdata,), options = calls["embed"]
    assert isinstance(sdata, SpatialData)
    assert options == {
        "image_key": "he", "encoder": "efficientnet-lite0", "mode": "dense", "symmetries": 4, "table_key": "cells",
    }  # fmt: skip
    assert read_zarr(out).tables["cells"].n_obs == 6


def test_distill_names_a_model_folder_beside_the_output(monkeypatch, stored: Path, tmp_path: Path, capsys) -> None:
    calls: dict = {}
    monkeypatch.setattr(hn, "tl", SimpleNamespace(distill_niches=_record(calls, "distill")), raising=False)
    out = tmp_path / "out.zarr"
    assert cli.main(["distill", str(stored), str(out), "--n-niches", "7", "--seed", "3"]) == 0
    options = calls["distill"][1]
    assert options["model_dir"] == tmp_path / "out_model"
    assert (options["n_niches"], options["seed"], options["encoder"], options["mode"]) == (7, 3, "uni2-h", "crop")
    assert options["symmetries"] == 1
    assert str(tmp_path / "out_model") in capsys.readouterr().out

    (tmp_path / "second_model").mkdir()
    assert cli.main(["distill", str(stored), str(tmp_path / "second.zarr")]) == 2
    assert "second_model exists already" in capsys.readouterr().err


def test_predict_counts_all_niches(monkeypatch, stored: Path, tmp_path: Path, capsys) -> None:
    calls: dict = {}
    fake = SimpleNamespace(predict_niches=_record(calls, "predict", _fake_niches))
    monkeypatch.setattr(hn, "tl", fake, raising=False)
    model, out = tmp_path / "model", tmp_path / "out.zarr"
    model.mkdir()
    assert cli.main(["predict", str(stored), str(out), str(model)]) == 0
    assert calls["predict"][0][1] == model
    assert "cells per niche: 0: 3, 1: 3, 2: 0" in capsys.readouterr().out
    assert "niche" in read_zarr(out).tables["cells"].obs


def test_demo_folder_replaces_only_its_own_files(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    out = cli._prepare_demo_folder(folder, overwrite=False)
    assert folder.is_dir()
    assert not any(path.exists() for path in out.values())
    (folder / "mine.txt").write_text("mine")
    out["model"].mkdir()
    (out["model"] / "config.json").write_text("{}")
    out["map"].write_text("png")
    with pytest.raises(FileExistsError, match="--overwrite"):
        cli._prepare_demo_folder(folder, overwrite=False)
    assert out["map"].exists()
    cli._prepare_demo_folder(folder, overwrite=True)
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]


def test_demo_refuses_before_any_work(tmp_path: Path, capsys) -> None:
    (tmp_path / "niche_map.png").write_text("png")
    assert cli.main(["demo", "--output", str(tmp_path)]) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_runs_every_stage(tmp_path: Path, capsys) -> None:
    """The README's first command, on a smaller tissue."""
    out = tmp_path / "demo"
    assert cli.main(["demo", "--output", str(out), "--n-cells", "2500", "--n-niches", "3", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "synthetic tissue" in text
    table = read_zarr(out / "tissue.zarr").tables["table"]
    assert table.n_obs == 2500
    for key in ("niche", "niche_teacher", "niche_confidence", "split"):
        assert key in table.obs
    assert list(table.obs["niche"].cat.categories) == ["0", "1", "2"]
    for row in table.uns["niche_evaluation"].index:
        assert str(row) in text
    assert {path.name for path in (out / "model").iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    assert (out / "niche_map.png").read_bytes().startswith(b"\x89PNG")
    for name in ("tissue.zarr", "model", "niche_map.png"):
        assert str(out / name) in text


def test_doctor_reports_this_machine(capsys, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("torch", "efficientnet-lite0", "uni2-h", "cache_dir", "no token"):
        assert part in text
