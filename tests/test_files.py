"""Files and folders appear whole, readable as the user's umask says, or not at all."""

import os
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux2pixel.runtime import files
from flux2pixel.runtime.errors import UsageError


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_written_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    tensors = {"basis": torch.zeros(2)}
    files.write(tmp_path / "a.safetensors", lambda temporary: save_file(tensors, temporary))
    with files.new_folder(tmp_path / "model", "convert") as folder:
        save_file(tensors, folder / "b.safetensors")
    expected = mode(tmp_path / "plain")
    assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "model" / "b.safetensors") == expected


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    files.write_json(path, 1)
    with files.new_folder(folder, "convert") as made:
        files.write_json(made / "conversion.json", 1)

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        files.write(path, fail)
    with pytest.raises(ValueError, match="stop"), files.new_folder(folder, "convert") as made:
        fail(made / "conversion.json")
    assert path.read_text() == (folder / "conversion.json").read_text() == "1\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def model(path: Path, text: str, stage: str = "finetune", overwrite: bool = False) -> None:
    with files.new_folder(path, stage, overwrite) as folder:
        (folder / "weights").mkdir()
        (folder / "weights" / "a.txt").write_text(text)


def test_nothing_of_the_users_beside_a_folder_is_touched(tmp_path: Path, capsys) -> None:
    """``mv finetuned finetuned.old`` is what people do before they train again."""
    best = tmp_path / "finetuned.old" / "my-best-model.safetensors"
    kept = tmp_path / "finetuned.tmp" / "notes.txt"
    for path in (best, kept):
        path.parent.mkdir()
        path.write_text("mine")
    model(tmp_path / "finetuned", "first")
    model(tmp_path / "finetuned", "second")
    assert "will be replaced" in capsys.readouterr().err
    with pytest.raises(ValueError, match="stop"), files.new_folder(tmp_path / "finetuned", "finetune"):
        raise ValueError("stop")
    assert (tmp_path / "finetuned" / "weights" / "a.txt").read_text() == "second"
    assert best.read_text() == kept.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["finetuned", "finetuned.old", "finetuned.tmp"]


def test_a_folder_with_files_of_the_user_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "finetuned"
    model(path, "first")
    (path / "weights" / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"1 files that finetune did not write \(weights/notes.md\)"):
        model(path, "second")
    with pytest.raises(UsageError, match="was written by finetune, not convert"):
        model(path, "second", "convert")
    assert (path / "weights" / "notes.md").read_text() == "mine"
    model(path, "second", overwrite=True)
    assert not (path / "weights" / "notes.md").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a").touch()
    with pytest.raises(UsageError, match="not written by flux2pixel"):
        model(tmp_path / "other", "third", overwrite=True)


def test_notes_that_come_while_a_folder_is_made_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "model"

    def write() -> None:
        with files.new_folder(path, "convert"):
            path.mkdir()
            (path / "notes").touch()

    with pytest.raises(UsageError, match="not written by flux2pixel"):
        write()
    assert (path / "notes").exists() and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.name == "nt", reason="symlinks need rights there")
def test_a_link_to_a_big_disk_stays_a_link(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk", tmp_path / "run" / "converted"
    (disk / "model").mkdir(parents=True)
    link.parent.mkdir()
    link.symlink_to(disk / "model")
    with files.new_folder(link, "convert") as folder:
        assert folder.parent == disk, "the files go to the disk that the link is for"
        (folder / "a").touch()
    assert link.is_symlink() and (disk / "model" / "a").exists() and len(list(disk.iterdir())) == 1


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path, both = tmp_path / "file", threading.Barrier(2)

    def save(text: str, temporary: Path) -> None:
        temporary.write_text(text)
        both.wait(10)  # both have written before either is renamed
        assert temporary.read_text() == text

    failed: list[BaseException] = []

    def run(text: str) -> None:
        try:
            files.write(path, lambda temporary: save(text, temporary))
        except BaseException as error:
            failed.append(error)

    writers = [threading.Thread(target=run, args=(text,)) for text in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed and path.read_text() in ("one", "two")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_umask_is_never_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the whole process's: a file that another thread makes at that moment would be for all to write."""
    monkeypatch.setattr(os, "umask", None)
    files.write_json(tmp_path / "a", 1)
    model(tmp_path / "b", "text")


def test_windows_syncs_files_open_for_writing_and_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, plain = [], os.open

    def noted(path: Path, flags: int, *mode: int) -> int:
        if Path(path).is_relative_to(tmp_path) and not Path(path).is_dir():
            opened.append(flags)
        assert not Path(path).is_dir() or not Path(path).is_relative_to(tmp_path), "Windows opens no folder"
        return plain(path, flags, *mode)

    monkeypatch.setattr(os, "open", noted)
    monkeypatch.setattr(files, "WINDOWS", True)
    model(tmp_path / "b", "text")
    files.write_json(tmp_path / "a", 1)
    assert opened and all(flags & (os.O_RDWR | os.O_WRONLY) for flags in opened)
