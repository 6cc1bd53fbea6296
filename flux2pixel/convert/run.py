"""The convert stage: a latent checkpoint and a subspace -> a pixel model in a diffusers-style folder.

Planned from headers, streamed into a temporary folder, reopened and proven there, and only then renamed into place.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from flux2pixel import __version__
from flux2pixel.asymflow.codec import Codec
from flux2pixel.asymflow.method import AsymFlow
from flux2pixel.convert.extras import Extras
from flux2pixel.convert.fitting import fit_without_images
from flux2pixel.convert.plan import Plan, class_shapes, index_of, linkable
from flux2pixel.convert.prepare import prepare
from flux2pixel.convert.verify import Proof, check_written, prove
from flux2pixel.models.base import Base, open_base
from flux2pixel.models.folder import PixelFolder, digest_in_name, finish, write_folder
from flux2pixel.models.sampler import Sampler, of_conversion
from flux2pixel.recipe import Recipe, dumps
from flux2pixel.runtime import files
from flux2pixel.runtime.errors import Flux2PixelError, UsageError
from flux2pixel.runtime.launch import set_threads
from flux2pixel.runtime.progress import bar, log
from flux2pixel.subspace.gather import vae_digest
from flux2pixel.weights.checkpoint import INDEX, refuse
from flux2pixel.weights.subspace import read_subspace
from flux2pixel.weights.write import link_or_copy, write_file

# The published sampler of the released pixel model.
PUBLISHED = Sampler(steps=38, guidance=4.0, shift=17.0, solver="unipc", orthogonal=True, gamut_clamp=True)


def convert(
    recipe: Recipe,
    run: Path,
    subspace: Path | None = None,
    out: Path | None = None,
    extras: Extras | None = None,
    overwrite: bool = False,
) -> Path:
    """Fold the subspace into the base, write the result, prove it exact; returns the model's folder.

    Raises Flux2PixelError if the base is unsound, the disk too small, or the exact test's error above
    ``convert.tolerance``: nothing is left then. Without a subspace, given or in the run directory, one is fitted to the
    VAE alone, since that needs no images.
    """
    set_threads(recipe.threads)
    extras = extras or Extras()
    flow, made_with = None, _digests(extras)
    if extras.adapter is None:
        if subspace is None:
            subspace = run / "subspace.safetensors"
            if not subspace.is_file():
                fit_without_images(recipe, open_base(recipe.base), subspace)
        flow, metadata = read_subspace(subspace)
        made_with |= {"subspace": metadata, "subspace_sha256": files.digest(subspace)}
    job = prepare(recipe, flow, extras)
    base, flow = job.base, job.flow
    assert flow is not None
    if subspace:
        _check_fit(base, recipe.base, flow, made_with["subspace"], subspace)
    destination = out or run / "converted"
    job.plan.check_room(destination)
    log(f"convert: base {base.folder}, {extras.adapter or subspace}")
    for caution in base.cautions():
        log(f"note: {caution}")
    with files.new_folder(destination, "convert", overwrite) as folder:
        digests = write_transformer(job.plan, folder / "transformer", base.pixel_config(base.config), base, recipe)
        shapes = class_shapes(base.network_class(), base.pixel_config(base.config))
        written = check_written(folder / "transformer", job.plan, shapes)
        proof = prove(base, job.latent, written, flow, recipe.convert.verify_steps, recipe.seed) if job.exact else None
        if job.exact:
            _judge(proof, recipe)
        else:
            log("exactness: not tested: an adapter's projections are trained, not folded")
        copy_companions(job.plan, folder)
        sampler = of_conversion(base, float(flow.scale)) if job.exact else PUBLISHED
        codec = Codec(base.patch_size)
        model = PixelFolder(recipe.base, base.family, base.color_space, flow, codec, sampler, {})
        write_folder(folder, model, recipe)
        record = made_with | {
            "exactness": proof.as_dict() if proof else None,
            "changed": {output.name: output.action for output in job.plan.changed},
        }
        finish(folder, base, model, recipe, record | {"transformer_sha256": digests})
    log(f"wrote {destination}")
    return destination


def _digests(extras: Extras) -> dict[str, Any]:
    """SHA-256 of every file that took part beside the base."""
    named = {"weights": extras.weights, "adapter": extras.adapter}
    found: dict[str, Any] = {f"{key}_sha256": files.digest(path) for key, path in named.items() if path}
    loras = [{"sha256": files.digest(path), "strength": strength} for path, strength in extras.loras]
    return found | ({"loras": loras} if loras else {})


def write_transformer(plan: Plan, folder: Path, config: dict[str, Any], base: Base, recipe: Recipe) -> dict[str, Any]:
    """Write the planned shards, their index and ``config.json``; returns SHA-256 by file name.

    A linked file is not read, so it has the digest that its name in the Hub's cache states, or none.
    """
    import diffusers

    folder.mkdir(parents=True)
    notes = {"format": "pt", "made_by": f"flux2pixel {__version__}", "base": recipe.base, "recipe": dumps(recipe)}
    digests: dict[str, Any] = {}
    broken: list[str] = []
    with bar("convert", sum(shard.size for shard in plan.shards), unit="bytes") as progress:
        for shard in plan.shards:
            target = folder / shard.name
            if plan.link and shard.twin and link_or_copy(shard.twin, target):
                digests[shard.name] = digest_in_name(shard.twin.resolve())
                progress.advance(shard.size, note="linked")
            else:
                target.unlink(missing_ok=True)
                digests[shard.name], unfit = write_file(target, shard.outputs, notes, progress)
                broken += unfit
    refuse(base.folder, [f"{name} has values that are NaN or infinite" for name in broken])
    index = index_of(plan)
    if index:
        files.write_json(folder / INDEX, index)
    described = {"_class_name": base.network_class().__name__, "_diffusers_version": diffusers.__version__}
    files.write_json(folder / "config.json", described | config)
    return digests


def copy_companions(plan: Plan, folder: Path) -> None:
    """Copy, or link, the base's text encoders, tokenizers and scheduler."""
    with bar("keep", len(plan.companions), unit="files") as progress:
        for name, path in plan.companions:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if not (plan.link and linkable(name)):
                shutil.copyfile(path.resolve(), target)
            else:
                link_or_copy(path, target)
            progress.advance(1, note=name)


def _judge(proof: Proof | None, recipe: Recipe) -> None:
    """Say how exact the conversion is; raise Flux2PixelError if it is not."""
    if proof is None:
        log("exactness: not tested, not even one block of each kind fits in memory")
        return
    log(
        f"exactness: {proof.max_abs_error:.1e} over {proof.steps} Euler steps in float64 ({proof.depth}); "
        f"{proof.stored_error:.1e} with the weights as stored"
    )
    if not proof.max_abs_error <= recipe.convert.tolerance:
        raise Flux2PixelError(
            f"exactness error {proof.max_abs_error:.1e} is above convert.tolerance {recipe.convert.tolerance:g}: "
            "nothing was written"
        )


def _check_fit(base: Base, name: str, flow: AsymFlow, metadata: dict[str, str], path: Path) -> None:
    """Refuse a subspace of another base, VAE, patch size or rank."""
    width = (base.token_width, base.latent_width)
    if tuple(flow.basis.shape) != width:
        found = tuple(flow.basis.shape)
        raise UsageError(f"{path}: basis {found} is not of patch size {base.patch_size} and rank {width[1]}: {width}")
    if metadata.get("vae_sha256") and metadata["vae_sha256"] != vae_digest(base):
        raise UsageError(f"{path}: fitted for base {metadata.get('base')!r}, not for {name!r}; fit one for this base")
