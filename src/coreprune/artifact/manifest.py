"""manifest.json: which files an artifact holds and how to rebuild the model. Its content is not trusted."""

from __future__ import annotations

import hashlib
import json
import math
import re
import reprlib
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coreprune.errors import ArtifactError, first_line
from coreprune.graph import Recipe

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS, PLAN, REPORT, PAGE, QUERIES = (
    "model.safetensors",
    "plan.json",
    "report.json",
    "report.html",
    "queries.safetensors",
)
FILES = (WEIGHTS, PLAN, REPORT, PAGE, QUERIES)
# Files for stock transformers, beside its config.json.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LARGEST_JSON = 1 << 28  # bytes
_LARGEST = 1 << 62
_MOST_AXES = 64
_HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """One file. bytes: its size. sha256: the hash of its content, hexadecimal."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of model.safetensors. shape: after pruning. dtype: as torch names it, e.g. float32."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Manifest:
    """What an artifact holds.

    fingerprint: that of the dense architecture (`plans.plan.fingerprint`). tensors: the tensors by canonical name.
    aliases: other names of tied tensors. recipe: how the dense shapes become the pruned ones. files: the files by name,
    without the manifest itself. loads_with: "transformers" if from_pretrained can read the folder, else "coreprune".
    why: why from_pretrained cannot read the folder, or empty. model_class: the class of the dense model. config: the
    configuration of the dense Hugging Face model, else None. source: how the command line found the dense model
    (source, weights, shape), else empty. versions: the versions and the platform that the result depends on.
    """

    fingerprint: str
    tensors: Mapping[str, TensorEntry]
    aliases: Mapping[str, str]
    recipe: Recipe
    files: Mapping[str, FileEntry]
    model_class: str = ""
    loads_with: str = "coreprune"
    why: str = ""
    config: Mapping[str, Any] | None = None
    source: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of manifest.json."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact. Raises ArtifactError for anything that is not one."""
    path = folder / MANIFEST
    raw = json_of(path)
    try:
        if type(raw["schema"]) is not int or raw["schema"] != SCHEMA:
            raise ArtifactError(
                f"{path} has schema {reprlib.repr(raw['schema'])}; this version of coreprune reads {SCHEMA}. "
                "Load it with the version that wrote it (see its versions)."
            )
        return Manifest(
            fingerprint=_text(raw["fingerprint"]),
            tensors={_text(n): _tensor(e) for n, e in raw["tensors"].items()},
            aliases={_text(a): _text(n) for a, n in raw["aliases"].items()},
            recipe=_recipe(raw["recipe"]),
            files={_file_name(n): FileEntry(_whole(e["bytes"]), _hash(e["sha256"])) for n, e in raw["files"].items()},
            model_class=_text(raw.get("model_class", "")),
            loads_with=_text(raw.get("loads_with", "coreprune")),
            why=_text(raw.get("why", "")),
            config=_mapping(raw["config"]) if raw.get("config") is not None else None,
            source=_mapping(raw.get("source", {})),
            versions=_mapping(raw.get("versions", {})),
        )
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is not a manifest that coreprune wrote ({first_line(error)}).") from error


def json_of(path: Path) -> Any:
    """Read a JSON file of a reasonable size. Raises ArtifactError."""
    try:
        size = regular(path)
        if size > _LARGEST_JSON:
            raise ArtifactError(f"{path} has {size:,} bytes, more than coreprune ever writes.")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror or error}. An artifact is a folder that coreprune.save wrote."
        ) from error
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ArtifactError(f"{path} is damaged: it is not JSON ({first_line(error)}).") from error


def check_file(folder: Path, name: str, entry: FileEntry) -> Path:
    """Check that a file has the size and hash that the manifest says. Return its path. Raises ArtifactError."""
    path = folder / name
    try:
        size = regular(path)
        if size != entry.bytes:
            raise ArtifactError(
                f"{path} has {size:,} bytes, the manifest says {entry.bytes:,}: the copy is incomplete or was changed. "
                "Copy the whole folder again."
            )
        if sha256(path) != entry.sha256:
            raise ArtifactError(f"the content of {path} is not what was saved: its hash differs. Copy it again.")
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}. Copy the whole folder again.") from error
    return path


def regular(path: Path) -> int:
    """The size of a regular file. Links are followed, because download caches consist of them.

    Raises OSError, and ArtifactError for anything else, such as a device or a pipe, which could be read without end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ArtifactError(f"{path} is not a regular file. Copy the whole folder again.")
    return status.st_size


def sha256(path: Path) -> str:
    """The hash of a file, which is read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError(f"{reprlib.repr(x)} is no text")
    return x


def _whole(x: Any) -> int:
    if type(x) is not int or not 0 <= x <= _LARGEST:
        raise ValueError(f"{reprlib.repr(x)} is no size")
    return x


def _shape(x: Any) -> tuple[int, ...]:
    if not isinstance(x, (list, tuple)) or len(x) > _MOST_AXES:  # the product of very many sizes takes very long
        raise ValueError(f"{reprlib.repr(x)} is no shape")
    shape = tuple(_whole(n) for n in x)
    if math.prod(shape) > _LARGEST:
        raise ValueError(f"{reprlib.repr(shape)} is no shape")
    return shape


def _mapping(x: Any) -> dict[str, Any]:
    if not isinstance(x, dict):
        raise TypeError(f"{type(x).__name__} in place of a mapping")
    return x


def _hash(x: Any) -> str:
    if not _HASH.fullmatch(_text(x)):
        raise ValueError("a hash has 64 hexadecimal digits")
    return x


def _file_name(x: Any) -> str:
    if x not in FILES and x not in ("config.json", "generation_config.json", *TOKENIZER):
        raise ValueError(f"{reprlib.repr(x)} has no place in an artifact")
    return x


def _tensor(x: Any) -> TensorEntry:
    if x["dtype"] not in DTYPES.values():
        raise ValueError(f"no dtype {reprlib.repr(x['dtype'])}")
    return TensorEntry(_shape(x["shape"]), x["dtype"])


def _recipe(x: Any) -> Recipe:
    shapes = {_text(n): (_shape(a), _shape(b)) for n, (a, b) in x["shapes"].items()}
    for name, (before, after) in shapes.items():
        if len(before) != len(after) or any(b > a for a, b in zip(before, after, strict=True)):
            raise ValueError(f"pruning cannot make {name} {after} out of {before}")
    numbers = {
        _text(path): {_text(key): (_number(a), _number(b)) for key, (a, b) in changes.items()}
        for path, changes in x["numbers"].items()
    }
    for path, changes in numbers.items():
        for key, (before, after) in changes.items():
            a, b = ((n,) if isinstance(n, int) else n for n in (before, after))
            if type(before) is not type(after) or len(a) != len(b) or any(y > x for x, y in zip(a, b, strict=True)):
                raise ValueError(f"pruning cannot make {path}.{key} {after} out of {before}")
    dropped = tuple(map(_text, x.get("dropped", ())))
    plain, recast = (tuple(map(_text, x.get(name, ()))) for name in ("plain", "recast"))
    return Recipe(shapes, numbers, plain, dropped, _text(x.get("rest", "")), recast)


def _number(x: Any) -> int | tuple[int, ...]:
    return _shape(x) if isinstance(x, list) else _whole(x)
