"""Checkpoints on the Hub, as their headers declare them: enough to plan a conversion without downloading it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.weights.checkpoint import INDEX, SINGLE, Checkpoint, Span, Stored


@dataclass(frozen=True)
class Remote:
    """A repository's files by name, with their sizes in bytes, at one commit."""

    repo: str
    commit: str
    sizes: Mapping[str, int]

    def checkpoint(self, part: str = "transformer") -> Checkpoint:
        """The tensors of a part's safetensors files, from a few kilobytes of each; what they name cannot be read.

        Raises UsageError if there is no such checkpoint, Flux2PixelError if a file that the index names is absent.
        """
        from huggingface_hub import HfApi, hf_hub_download

        names = [name for name in self.sizes if str(PurePosixPath(name).parent) == part]
        if f"{part}/{INDEX}" in names:
            index = Path(hf_hub_download(self.repo, f"{part}/{INDEX}", revision=self.commit))
            files = [f"{part}/{file}" for file in dict.fromkeys(json.loads(index.read_text())["weight_map"].values())]
        else:
            singles = [name for name in names if name.endswith(".safetensors")]
            files = [f"{part}/{SINGLE}"] if f"{part}/{SINGLE}" in singles else singles
        if absent := [file for file in files if file not in self.sizes]:
            raise Flux2PixelError(f"{self.repo}: {', '.join(absent[:5])}: named by the index and not there")
        if not files:
            raise UsageError(f"{self.repo}: no safetensors file in {part}/; it cannot be converted")
        tensors, metadata = {}, {}
        for file in files:
            header = HfApi().parse_safetensors_file_metadata(self.repo, file, revision=self.commit)
            path = Path(file)
            metadata[path] = dict(header.metadata or {})
            for name, entry in header.tensors.items():
                first, last = entry.data_offsets
                tensors[name] = Stored(entry.dtype, tuple(entry.shape), (Span(path, first, last - first),))
        return Checkpoint(tuple(map(Path, files)), tensors, metadata)


def open_remote(name: str) -> Remote:
    """List a repository of the Hub; ``name`` is ``owner/name`` or ``owner/name@revision``.

    Raises what huggingface_hub does where it is absent, gated, or cannot be reached.
    """
    from huggingface_hub import HfApi

    repo, _, revision = name.partition("@")
    info = HfApi().model_info(repo, revision=revision or None, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    return Remote(repo, info.sha or revision or "main", sizes)
