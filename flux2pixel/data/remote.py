"""Sources that stream: webdataset tars, and datasets of the Hugging Face library (both need the extra ``data``)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from flux2pixel.data.decode import SUFFIXES, Unreadable
from flux2pixel.data.sources import CAPTION_KEYS, Record, expand, first_of, part
from flux2pixel.runtime.errors import UsageError, one_line


def _needs(package: str, what: str) -> UsageError:
    return UsageError(f"{what}: needs the package {package}; pip install 'flux2pixel[data]'")


class Tars:
    """Webdataset shards. A damaged tar gives what it holds before the damage, and one broken record that names it.

    Unlimited, whole shards go to a process where there are enough of them; otherwise every process reads all shards
    and keeps its share, which a limit bounds.
    """

    count = None

    def __init__(self, pattern: str):
        try:
            import webdataset  # noqa: F401
        except ImportError as error:
            raise _needs("webdataset", pattern) from error
        self.name, self.urls = pattern, expand(pattern)

    def records(self, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Record]:
        if not limit and len(self.urls) >= world:
            return self._read(self.urls[rank::world])
        return part(self._read(self.urls), rank, world, limit)

    def _read(self, urls: list[str]) -> Iterator[Record]:
        # Not wds.WebDataset: it splits shards by the process group's environment, a second time after ours.
        from webdataset.tariterators import tarfile_samples

        for url in urls:
            damage: list[Exception] = []

            def noted(error: Exception, damage: list[Exception] = damage) -> bool:
                damage.append(error)
                return False

            for sample in tarfile_samples(iter([{"url": url}]), handler=noted):
                yield _from_tar(sample, Path(url).name)
            for error in damage:
                reason = str(error.args[0]) if error.args else type(error).__name__
                yield Record(url, None, Unreadable(f"the tar cannot be read further: {reason}"))


def _from_tar(sample: dict[str, Any], shard: str) -> Record:
    name = f"{shard}/{sample['__key__']}"
    image = next((sample[key] for key in sample if f".{key.rpartition('.')[2]}" in SUFFIXES), None)
    members = ", ".join(key for key in sample if not key.startswith("__"))
    if image is None:
        return Record(name, None, Unreadable(f"no picture among its members ({members})"))
    try:
        if "json" in sample and "txt" not in sample:
            import json

            caption = first_of(json.loads(sample["json"]), CAPTION_KEYS)
        else:
            text = first_of(sample, ("txt", *CAPTION_KEYS))
            caption = None if text is None else bytes(text).decode("utf-8").strip()  # type: ignore[call-overload]
    except (ValueError, AttributeError) as error:
        return Record(name, None, Unreadable(f"its caption cannot be read ({one_line(error)})"))
    return Record(name, caption if isinstance(caption, str) else None, image)


class HuggingFace:
    """``hf:NAME?split=...``: a Hub id, a folder that ``load_dataset`` knows, or one that ``save_to_disk`` wrote."""

    OPTIONS = ("split", "config", "revision", "image", "caption", "streaming")

    def __init__(self, spec: str):
        try:
            import datasets
        except ImportError as error:
            raise _needs("datasets", spec) from error
        path, _, query = spec.removeprefix("hf:").partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if not path or options.keys() - set(self.OPTIONS):
            unknown = ", ".join(sorted(options.keys() - set(self.OPTIONS))) or "an empty name"
            raise UsageError(f"{spec}: {unknown} is not known; hf:NAME?{'=...&'.join(self.OPTIONS)}=true")
        self.name = spec
        self.streaming = options.get("streaming", "false").lower() in ("true", "1", "yes")
        try:
            self.data = self._load(path, options)
            self.image = self._column(options.get("image"), datasets.Image)
            self.caption = self._column(options.get("caption"), datasets.Value)
            # Undecoded, so that bytes are hashed and decoded by the same rules as every other source's.
            self.data = self.data.cast_column(self.image, datasets.Image(decode=False))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{spec}: cannot be opened ({one_line(error)})") from error

    def _load(self, path: str, options: dict[str, str]) -> Any:
        import datasets

        split = options.get("split", "train")
        if (Path(path) / "state.json").is_file() or (Path(path) / "dataset_dict.json").is_file():
            stored = datasets.load_from_disk(path)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        return datasets.load_dataset(
            path, options.get("config"), split=split, revision=options.get("revision"), streaming=self.streaming
        )

    def _column(self, named: str | None, kind: type) -> Any:
        """The named column, or the only image column, or the first string column with a caption's name."""
        import datasets

        features = self.data.features or {}
        if named is not None:
            if named not in features:
                raise UsageError(f"{self.name}: no column {named!r}; it has {', '.join(features)}")
            return named
        found = [name for name, feature in features.items() if isinstance(feature, kind)]
        if kind is datasets.Value:
            return next((name for name in CAPTION_KEYS if name in found), None)
        if len(found) != 1:
            raise UsageError(
                f"{self.name}: {len(found)} image columns among {', '.join(features) or 'none'}; name one with image="
            )
        return found[0]

    @property
    def count(self) -> int | None:
        return None if self.streaming else len(self.data)

    def records(self, rank: int = 0, world: int = 1, limit: int = 0) -> Iterator[Record]:
        from datasets.distributed import split_dataset_by_node

        if not self.streaming:
            total = min(len(self.data), limit or len(self.data))
            for index in range(rank, total, world):
                yield self._record(index, self.data[index])
            return
        if limit:
            for index, row in enumerate(self.data.take(limit)):
                if index % world == rank:
                    yield self._record(index, row)
            return
        for index, row in enumerate(split_dataset_by_node(self.data, rank, world)):
            yield self._record(index * world + rank, row)

    def _record(self, index: int, row: dict[str, Any]) -> Record:
        caption = row[self.caption] if self.caption else None
        cell = row[self.image]
        content: Path | bytes | np.ndarray | Unreadable
        if cell and cell.get("bytes"):
            content = cell["bytes"]
        elif cell and cell.get("path"):
            content = Path(cell["path"])
        else:
            content = Unreadable("the row has no picture")
        return Record(f"row {index}", caption, content)
