"""``bases``: what can be converted."""

import typer

from flux2pixel.families import registry
from flux2pixel.families.known import KNOWN


def bases_command() -> None:
    """List the bases that can be converted: alias, Hub id, licence, size, token widths, sampling, status."""
    typer.echo(bases_table())


def bases_table() -> str:
    """Every base by alias, one a line, the bundled ones first."""

    heads = ("alias", "Hub id", "gated", "licence", "parameters", "r", "D", "patch", "steps", "guidance", "status")
    rows = [heads, *map(_bundled, registry.names())]
    for alias, known in KNOWN.items():
        status = "ready"
        if known.refused:
            status = f"refused: {known.refused}"
        elif known.undistilled:
            status = f"ready, but distilled: prefer {known.undistilled}"
        size, width = f"{known.parameters / 1e9:.2f}B", str(3 * known.patch**2)
        sampling = (str(known.defaults.steps), f"{known.defaults.guidance:g}")
        gated = "yes" if known.gated else "no"
        rows.append(
            (alias, known.hub, gated, known.licence, size, str(known.rank), width, str(known.patch), *sampling, status)
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _bundled(name: str) -> tuple[str, ...]:
    """The row of a registered base, read off its files."""
    from flux2pixel.families.registry import plugin
    from flux2pixel.models.base import open_base
    from flux2pixel.weights.header import read_header

    registered, base = plugin(name), open_base(name)
    assert registered is not None, name
    count = sum(read_header(path).parameters for path in (base.folder / "transformer").glob("*.safetensors"))
    widths = (str(base.latent_width), str(base.token_width), str(base.patch_size))
    return (name, "(in the package)", "no", registered.licence, f"{count / 1e6:.1f}M", *widths, "", "", "ready")
