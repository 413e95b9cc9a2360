"""Name or path → the local folder of a base, and what can be known of it without opening the model.

Nothing heavy is imported until a tokenizer, a GGUF file or the hub is needed, so that work whose tokens lie in the
cache starts at once.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from deltaw.base import builtin
from deltaw.base.builtin import BUILTIN, CONVERTER_VERSION, cache_folder
from deltaw.disk import make_once, remembered_digest
from deltaw.errors import BaseError

# The same weights once more, in other formats.
_HUB_LEFT = ["*/*.safetensors", "*/*.json", "*/*.txt", "*/tokenizer.model", "consolidated*"]
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "*.txt"]
MORE_TEMPLATES = "additional_chat_templates"  # a folder, as transformers writes several
_TOKENIZER_FILES = (
    *("token*", "chat_template*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab*", "merges.txt", "*.tiktoken", "spiece.model", f"{MORE_TEMPLATES}/*"),
)


def public_name(name: str | Path) -> str:
    """The name under which others can find the base: what was asked for, or a folder's own name instead of its path."""
    if str(name) in BUILTIN or not Path(name).expanduser().exists():
        return str(name)
    return Path(name).expanduser().resolve().name


def base_path(name: str | Path, revision: str | None = None) -> Path:
    """The transformers folder of a base, for other tools. Raises BaseError.

    Of a built-in name or a GGUF file it lies in deltaw's cache, and is made there; of a hub id, in the hub's.
    """
    return locate(name, revision)


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The local folder of a base, fetched or converted into the cache if it is not there yet."""
    text = str(name)
    path = Path(text).expanduser()
    if text in BUILTIN:
        return builtin.base_path(text)
    if path.is_dir():
        return path
    if path.is_file():
        return _from_gguf(path)
    if path.is_absolute() or text.startswith(".") or text.count("/") != 1:
        known = ", ".join(sorted(BUILTIN))
        raise BaseError(f"There is no base {text!r}: no such folder or GGUF file, and not a built-in name ({known}).")
    return _from_hub(text, revision)


def _from_gguf(path: Path) -> Path:
    if path.suffix != ".gguf":
        raise BaseError(f"{path} is a file, but not a .gguf; give a transformers folder or a GGUF file.")
    digest = remembered_digest(path, cache_folder() / "digests")
    folder = cache_folder() / "gguf" / f"{path.stem}-{digest[:16]}-v{CONVERTER_VERSION}"
    make_once(folder, folder.is_dir, lambda: importlib.import_module("deltaw.base.gguf").convert_gguf(path, folder))
    return folder


def _from_hub(name: str, revision: str | None) -> Path:
    try:
        snapshot_download = importlib.import_module("huggingface_hub").snapshot_download
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_LEFT))
    except Exception as error:  # the hub's client raises a wide family; its own sentence is the useful part
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BaseError(
            f"Could not fetch {name!r} from the hub: {first_line} Give a local folder if you have the files already."
        ) from error


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; no code of it is run. Raises BaseError."""
    transformers = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # damaged files make every part of transformers fail in its own way
        raise BaseError(f"The tokenizer in {folder} cannot be opened: {error}") from error


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the files that make the tokenizer and its chat template."""
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    return hashlib.sha256("".join(file.name + remembered_digest(file) for file in files).encode()).hexdigest()


def template_prints_the_day(folder: Path) -> bool:
    """Whether a chat template in the folder asks for the day."""
    files = [
        file
        for pattern in ("chat_template*", "tokenizer_config.json", f"{MORE_TEMPLATES}/*")
        for file in folder.glob(pattern)
    ]
    return any(b"strftime_now" in file.read_bytes() for file in files if file.is_file())


def stated_context(folder: Path) -> int | None:
    """The context length that the folder's config states; None where it states none."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return None
    for part in (config, config.get("text_config") or {}):
        for key in ("max_position_embeddings", "n_positions", "max_seq_len"):
            if isinstance(part.get(key), int):
                return int(part[key])
    return None
