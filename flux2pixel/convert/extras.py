"""What a conversion may take beside base and subspace. Imports nothing heavy: the command line uses it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Extras:
    """``link``: share unchanged weight files with the base by hard links."""

    link: bool = False
