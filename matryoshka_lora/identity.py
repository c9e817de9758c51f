"""What tells one base model from another: its weights, its shape and its tokenizer, by content.

All bytes of the weights count. Reading them takes a while, so the digest of a file is kept in the
user's cache folder for as long as the file stays as it is. No paths are part of an identity: it is
the same on every machine.
"""

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import platformdirs
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import GENERATION_CONFIG_NAME

from matryoshka_lora.config import ModelConfig
from matryoshka_lora.core.errors import UserError
from matryoshka_lora.core.files import parse_json, write_atomically
from matryoshka_lora.models import (
    PROVENANCE,
    has_shape_file,
    load_shape,
    load_tokenizer,
    source_of,
    unreachable,
)

logger = logging.getLogger(__name__)

SETTLED = 2.0
"""Seconds after its last change from which on a file's times tell every later change."""
SLOW = 1 << 30
"""Bytes of a file whose digest takes long enough to say so."""


def model_identity(config: ModelConfig) -> dict[str, Any]:
    """What tells this base model from another.

    `revision`: the commit that the hub resolved; `config_sha256` of the shape, of a local folder;
    `weights`: a digest over all bytes of the safetensors, None for random ones; `tokenizer`: a
    digest over all that decides which tokens a text becomes; `provenance`: how a local folder was
    made. Raises UserError where they cannot be read.
    """
    identity: dict[str, Any] = {
        "name": config.name,
        "random_weights": config.random_weights,
        "revision": None,
        "config_sha256": None,
        "weights": None,
        "tokenizer": tokenizer_digest(load_tokenizer(config)),
        "provenance": None,
    }
    source = Path(source_of(config))
    if config.path is None and config.name != "tiny":
        if not has_shape_file(config):  # which is of no commit
            load_shape(config)  # from now on the hub's config.json is in its cache
            identity["revision"] = _cached_commit(config)
        if not config.random_weights:
            identity["weights"] = _digest_of(_hub_weights(config, identity["revision"]))
        return identity
    content = _read_object(source / "config.json")
    content.pop("transformers_version", None)
    identity["config_sha256"] = _digest_of(content)
    if not config.random_weights:
        names = _weights_among(path.name for path in source.glob("*.safetensors"))
        identity["weights"] = _digest_of({name: file_sha256(source / name) for name in names})
    if (source / PROVENANCE).is_file():
        identity["provenance"] = _read_object(source / PROVENANCE)
    return identity


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over all that decides which tokens a text becomes, and which of them are special."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    how = backend.to_str() if backend is not None else [type(tokenizer).__name__, vars(tokenizer)]
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    adds = [getattr(tokenizer, name, None) for name in ("add_bos_token", "add_eos_token")]
    return _digest_of([how, tokenizer.get_vocab() if backend is None else None, special, adds])


def generation_digest(config: ModelConfig) -> str:
    """sha256 over the base's generation config, which has a say in what an evaluation generates.

    Raises UserError for a damaged file of a local folder.
    """
    # transformers takes a damaged one for none.
    if (path := Path(source_of(config)) / GENERATION_CONFIG_NAME).is_file():
        _read_object(path)
    try:
        generation = GenerationConfig.from_pretrained(source_of(config), revision=config.revision)
    except OSError:  # it has none of its own; transformers then makes one from the shape
        generation = GenerationConfig.from_model_config(load_shape(config))
    content = generation.to_diff_dict()
    for name in ("transformers_version", "_from_model_config"):
        content.pop(name, None)
    return _digest_of(content)


def file_sha256(path: Path) -> str:
    """sha256 of a file, from the name of the hub's own blob or from the user's cache if known."""
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    state = real.stat()
    # The time of the last change of the inode, too: a copy may keep the time of the content.
    times = (state.st_mtime_ns, state.st_ctime_ns)
    key = _digest_of([str(real), state.st_size, *times, state.st_ino])
    kept = platformdirs.user_cache_path("matryoshka-lora") / "sha256" / key
    if kept.is_file() and re.fullmatch("[0-9a-f]{64}", known := kept.read_text().strip()):
        return known
    if state.st_size > SLOW:
        logger.info("reading all of %s for its digest, once", path)
    with real.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if time.time() - max(times) / 1e9 > SETTLED:
        try:
            write_atomically(kept, digest.encode())
        except OSError as error:  # it is read again the next time
            logger.debug("%s", error)
    return digest


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder. Raises UserError naming it."""
    try:
        content = parse_json(path.read_bytes())
    except UserError as error:
        raise UserError(f"{path} is {error}; restore the files of this model") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object; restore the files of this model")
    return content


def _cached_commit(config: ModelConfig) -> str | None:
    """The commit that the revision stands for; transformers has stopped to tell it."""
    found = try_to_load_from_cache(config.name, "config.json", revision=config.revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _hub_weights(config: ModelConfig, commit: str | None) -> dict[str, str]:
    """Name -> sha256 of the weights of a hub repository, without downloading them."""
    found = try_to_load_from_cache(config.name, "config.json", revision=commit)
    if isinstance(found, str):
        folder = Path(found).parent
        names = _weights_among(path.name for path in folder.glob("*.safetensors"))
        if names and _is_complete(names):
            return {name: file_sha256(folder / name) for name in names}
    try:
        info = HfApi().model_info(config.name, revision=commit, files_metadata=True)
    except Exception as error:  # no network is another class in each version of the client
        raise UserError(unreachable(config, config.name, error)) from error
    files = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs}
    return {name: files[name] for name in _weights_among(files)}


def _weights_among(names: Iterable[str]) -> list[str]:
    """The files that transformers reads the weights from; a repository may hold others."""
    names = sorted(name for name in names if re.fullmatch(r"[^/]*\.safetensors", name))
    if "model.safetensors" in names:
        return ["model.safetensors"]
    return [name for name in names if name.startswith("model-")] or names


def _is_complete(names: list[str]) -> bool:
    """Whether all parts `model-00001-of-00004.safetensors` are there."""
    parts = re.search(r"-of-(\d+)\.", names[0])
    return parts is None or len(names) == int(parts[1])


def _digest_of(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
