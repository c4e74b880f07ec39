"""What may be written into, what is cleared away, and what never is."""

from __future__ import annotations

import pytest
from accelerate import Accelerator

from rlcore.checkpoint import last_checkpoint, save_checkpoint
from rlcore.errors import UserError
from rlcore.output_dir import check_output_dir, discard_unstarted, prepare_output_dir


def test_an_output_directory_in_use_is_refused_unless_told_otherwise(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(UserError, match=r"--resume.*--overwrite-output-dir"):
        prepare_output_dir(tmp_path)
    with pytest.raises(UserError, match="no complete checkpoint"):
        prepare_output_dir(tmp_path, resume=True)
    prepare_output_dir(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_overwriting_spares_a_directory_that_holds_no_run(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not hold a training run"):
        prepare_output_dir(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_resuming_keeps_everything(tmp_path):
    prepare_output_dir(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    save_checkpoint(Accelerator(cpu=True), tmp_path, 1)
    prepare_output_dir(tmp_path, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert last_checkpoint(tmp_path) is not None


def test_checking_an_output_directory_touches_nothing(tmp_path):
    check_output_dir(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_output_dir(tmp_path / "file")


def test_the_remains_of_a_run_that_never_started_are_no_obstacle(tmp_path):
    directory = prepare_output_dir(tmp_path / "run")
    (directory / "training.yaml").write_text("model: a\n")
    check_output_dir(directory)
    discard_unstarted(directory)
    assert not directory.exists()
    directory = prepare_output_dir(tmp_path / "run")
    (directory / "notes.txt").write_text("mine")
    discard_unstarted(directory)
    assert (directory / "notes.txt").exists()
