"""What a conversion may take beside base and subspace. Imports nothing heavy: the command line uses it."""

from dataclasses import dataclass
from pathlib import Path

from flux2pixel.runtime.errors import UsageError


@dataclass(frozen=True)
class Extras:
    """What changes a conversion beyond its recipe.

    Args:
        link: share unchanged weight files with the base by hard links.
        weights: a single file to take the transformer's tensors from, in diffusers' or Black Forest Labs' names.
        loras: LoRA files to merge into the latent weights before the fold, with their strengths.
        adapter: a pixel-space adapter with a basis of its own, in the released format.
    """

    link: bool = False
    weights: Path | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    adapter: Path | None = None


def parse_lora(text: str) -> tuple[Path, float]:
    """``FILE`` or ``FILE:STRENGTH``. Raises UsageError if the file is absent or the strength no number."""
    path, colon, strength = text.rpartition(":")
    if not colon or Path(text).is_file():
        path, strength = text, "1"
    if not Path(path).is_file():
        raise UsageError(f"--lora {text}: no such file; write it as FILE or FILE:STRENGTH")
    try:
        return Path(path), float(strength)
    except ValueError as error:
        raise UsageError(f"--lora {text}: {strength!r} is not a number; write it as FILE or FILE:STRENGTH") from error
