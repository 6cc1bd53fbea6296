"""Files and folders appear whole, readable as the user's umask says, or not at all."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux2pixel.runtime import files


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def test_what_is_written_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    tensors = {"basis": torch.zeros(2)}
    files.write(tmp_path / "a.safetensors", lambda temporary: save_file(tensors, temporary))
    with files.new_folder(tmp_path / "model") as folder:
        save_file(tensors, folder / "b.safetensors")
    expected = mode(tmp_path / "plain")
    assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "model" / "b.safetensors") == expected


def test_a_failed_write_keeps_what_was_there(tmp_path: Path) -> None:
    path, folder = tmp_path / "file", tmp_path / "folder"
    files.write_json(path, 1)
    with files.new_folder(folder) as made:
        files.write_json(made / "conversion.json", 1)

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        files.write(path, fail)
    with pytest.raises(ValueError, match="stop"), files.new_folder(folder) as made:
        fail(made / "conversion.json")
    assert path.read_text() == (folder / "conversion.json").read_text() == "1\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
