"""Checkpoints: folders of safetensors and JSON that are there whole or not at all, and say so if they were harmed.

A checkpoint is written aside, flushed to disk, and then renamed: whatever kills the process, the folder `step-00000010`
either does not exist or is complete. What a disk or a person does to it later is found by the sizes and hashes in its
manifest. One run at a time may write into a folder of checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from agents.state.saved import (
    CheckpointError,
    json_text,
    load_optimizer_state,
    optimizer_state,
    rng_state,
    set_rng_state,
)
from llm_env.files import sync

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "latest_checkpoint",
    "load_checkpoint",
    "load_optimizer_state",
    "optimizer_state",
    "rng_state",
    "save_checkpoint",
    "set_rng_state",
]

FORMAT = "llm-env checkpoint"
VERSION = 1

_MANIFEST = "manifest.json"
_STATE = "state.json"
# Hidden folders beside the checkpoints. Those of the first two kinds are never read.
_SAVING, _DELETED, _REPLACED = ".saving-", ".deleted-", ".replaced-"
_FOLDER = re.compile(rf"(?P<replaced>{re.escape(_REPLACED)})?step-(?P<step>\d{{8,}})")


@dataclass
class Checkpoint:
    """What a run needs to go on.

    Attributes:
        step: the iteration after which it was made.
        tensors: named tensors, by the name of the file they lie in, such as "model" or "actor_optimizer".
        state: anything that JSON can hold; tuples come back as lists.
        folder: where it was loaded from or saved to.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Save as `folder/step-...`, whole or not at all, and delete older checkpoints but the newest.

    Args:
        folder: holds the checkpoints of one run.
        checkpoint: what to save. One of the same step that is there already is replaced.
        keep: how many checkpoints remain, this one included. Those of later steps are neither counted nor deleted:
            a run that resumed from an older checkpoint, because later ones were torn, will replace them in time.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1 (the checkpoint being saved), got {keep}")
    if not 0 <= checkpoint.step < 10**8:
        raise ValueError(f"a checkpoint's step must lie in 0..99999999, got {checkpoint.step}")
    state = json_text(checkpoint.state)
    folder.mkdir(parents=True, exist_ok=True)
    _clean(folder)
    final = folder / f"step-{checkpoint.step:08d}"
    aside = folder / f"{_SAVING}{final.name}-{uuid.uuid4().hex[:8]}"
    aside.mkdir()
    try:
        _write(aside, checkpoint, state)
        if final.exists():
            # Python cannot swap two folders in one call: the old one stays readable until the new one is in place.
            final.rename(folder / f"{_REPLACED}{final.name}")
        aside.rename(final)
        sync(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _prune(folder, checkpoint.step, keep)
    checkpoint.folder = final
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in one `step-...` folder, on the CPU.

    Raises:
        CheckpointError: it is torn (incomplete or changed), foreign (not one of ours), or of a newer version.
    """
    try:
        manifest = _read_manifest(folder)
        for name, expected in manifest["files"].items():
            _check_file(folder, name, expected)
        tensors = {}
        for name, tied in manifest["tensors"].items():
            tensors[name] = load_file(folder / f"{name}.safetensors")
            tensors[name].update({alias: tensors[name][original] for alias, original in tied.items()})
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder} cannot be read: {error!r}") from error
    return Checkpoint(manifest["step"], tensors, state, folder)


def latest_checkpoint(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why newer ones were refused."""
    refused: list[str] = []
    for _, path in sorted(_checkpoints(folder, replaced=True), reverse=True):
        try:
            return load_checkpoint(path), refused
        except CheckpointError as error:
            refused.append(str(error))
    return None, refused


def _write(aside: Path, checkpoint: Checkpoint, state: str) -> None:
    (aside / _STATE).write_text(state, encoding="utf-8")
    aliases = {}
    for name, tensors in checkpoint.tensors.items():
        if not re.fullmatch(r"\w[\w-]*", name):
            raise ValueError(f"the name {name!r} of tensors becomes a file's: use letters, digits, '_' and '-' only")
        stored, aliases[name] = _storable(tensors)
        save_file(stored, aside / f"{name}.safetensors")
    files = {}
    for path in sorted(aside.iterdir()):
        sync(path)
        files[path.name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "step": checkpoint.step,
        "written_by": {"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        "tensors": aliases,
        "files": files,
    }
    manifest["sha256"] = _digest(manifest)
    (aside / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    sync(aside / _MANIFEST)
    sync(aside)


def _storable(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors as safetensors takes them (none shares memory), and which names are tied to which others."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        view = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and view in seen:
            tied[name] = seen[view]
            continue
        seen[view] = name
        own = tensor.cpu().contiguous()
        # A part of a larger storage, or of one that another tensor has a part in, is copied out of it.
        if own.untyped_storage().nbytes() != own.nbytes or own.untyped_storage().data_ptr() in storages:
            own = own.clone()
        storages.add(own.untyped_storage().data_ptr())
        stored[name] = own
    return stored, tied


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{folder} is foreign: it has no {_MANIFEST}, so it is no checkpoint of llm-env")
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{folder} is torn: its {_MANIFEST} is no JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{folder} is foreign: its {_MANIFEST} does not say that it is a {FORMAT!r}")
    version = manifest.get("version")
    if version != VERSION:
        raise CheckpointError(f"{folder} has format version {version}, this llm-env reads {VERSION}: use the newer one")
    if manifest.pop("sha256", None) != _digest(manifest):
        raise CheckpointError(f"{folder} is torn: its {_MANIFEST} was changed after it was written")
    match = _FOLDER.fullmatch(folder.name)
    if match and int(match["step"]) != manifest["step"]:
        raise CheckpointError(f"{folder} is foreign: it holds step {manifest['step']}; was it renamed?")
    return manifest


def _check_file(folder: Path, name: str, expected: Mapping[str, Any]) -> None:
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder} is torn: {name} is missing")
    size = path.stat().st_size
    if size != expected["size"]:
        raise CheckpointError(f"{folder} is torn: {name} has {size} bytes, {expected['size']} were written")
    if _sha256(path) != expected["sha256"]:
        raise CheckpointError(f"{folder} is torn: the contents of {name} are not those that were written (SHA-256)")


def _checkpoints(folder: Path, replaced: bool = False) -> list[tuple[tuple[int, bool], Path]]:
    """Folders that look like checkpoints; those being replaced too if asked, each before the one that replaces it."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _FOLDER.fullmatch(path.name)
        if match and (replaced or not match["replaced"]):
            found.append(((int(match["step"]), not match["replaced"]), path))
    return found


def _prune(folder: Path, step: int, keep: int) -> None:
    older = sorted(path for (other, _), path in _checkpoints(folder) if other < step)
    for path in older[: max(0, len(older) - (keep - 1))]:
        _delete(path)
    _clean(folder)


def _clean(folder: Path) -> None:
    """Delete what dead runs have left behind. A replaced checkpoint stays until the one that replaces it is there."""
    for path in list(folder.iterdir()):
        if path.name.startswith(_REPLACED):
            name = path.name.removeprefix(_REPLACED)
            if (folder / name).exists():
                _delete(path)
            else:
                path.rename(folder / name)
        elif path.name.startswith((_SAVING, _DELETED)):
            shutil.rmtree(path)


def _delete(path: Path) -> None:
    """Under a hidden name first, so that a folder deleted in part is never taken for a checkpoint."""
    aside = path.with_name(f"{_DELETED}{path.name}-{uuid.uuid4().hex[:8]}")
    path.rename(aside)
    shutil.rmtree(aside) if aside.is_dir() else aside.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
