"""The weight files of a source checkpoint: which there are, what is in them, and their tensors without loading them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.checkpoint.layouts import read_json
from finetune.errors import UserError

# safetensors names -> bytes an element and torch names; other dtypes mean a quantised checkpoint.
DTYPES = {"BF16": (2, "bfloat16"), "F16": (2, "float16"), "F32": (4, "float32")}
FORMATS = (("model", ".safetensors"), ("pytorch_model", ".bin"))


@dataclass(frozen=True)
class Stored:
    """Where a source tensor lies: file name, safetensors dtype name, shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files, by the index where there is one; safetensors before .bin. Raises UserError if none."""
    weight_map = index_of(folder)
    if weight_map is not None:
        return sorted(set(weight_map.values()))
    for stem, suffix in FORMATS:
        if (folder / f"{stem}{suffix}").exists():
            return [f"{stem}{suffix}"]
    raise UserError(
        f"{folder} has no weights: expected model.safetensors, pytorch_model.bin or an index of either. "
        "Run the download step again."
    )


def index_of(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name from the index of the preferred format, or None without an index."""
    for stem, suffix in FORMATS:
        path = folder / f"{stem}{suffix}.index.json"
        if path.exists():
            weight_map = read_json(path, "it lists the weight files").get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise UserError(f"{path} has no weight_map. Download it again.")
            return weight_map
    return None


def read_headers(folder: Path) -> dict[str, Stored]:
    """Tensor name -> place for the whole checkpoint.

    Raises UserError if a file is missing or torn, a tensor stands in two files, or the index says otherwise.
    """
    files = weight_files(folder)
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} weight files are missing, first {missing[0]}. "
            "Run the download step again."
        )
    found: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(folder, file).items():
            if name in found:
                raise UserError(f"{folder}: tensor {name} stands in {found[name].file} and in {file}, expected once.")
            found[name] = stored
    check_index(folder, found)
    return found


def check_index(folder: Path, found: dict[str, Stored]) -> None:
    """Raise UserError if the index names a tensor that its file has not."""
    for name, file in (index_of(folder) or {}).items():
        if name not in found or found[name].file != file:
            where = found[name].file if name in found else "no file"
            raise UserError(f"{folder}: the index places {name} in {file}, found it in {where}. Download both again.")


def read_header(folder: Path, file: str) -> dict[str, Stored]:
    """Tensor name -> place of one file."""
    from finetune import tensor_files

    if file.endswith(".safetensors"):
        return {n: Stored(file, p.dtype, p.shape) for n, p in tensor_files.read_header(folder / file).items()}
    names = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
    with open_tensors(folder / file) as tensors:
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
        return {n: Stored(file, names.get(dtypes[n], dtypes[n]), tuple(t.shape)) for n, t in tensors.items()}


@contextmanager
def open_tensors(path: Path) -> Iterator[Mapping[str, Any]]:
    """Name -> torch tensor backed by the mapped file, so that reading one takes no memory of its own."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            yield LazyTensors(file)
    else:
        yield load_pickle(path)


class LazyTensors(Mapping):
    """A safetensors file as a mapping that reads on access."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> Any:
        return self._file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_pickle(path: Path) -> dict[str, Any]:
    """The tensors of a .bin file, mapped; nothing in the pickle but tensors is allowed. Raises UserError otherwise."""
    import pickle

    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"{path}: expected a complete PyTorch file of tensors alone ({reason}). Download it again."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise UserError(f"{path}: expected a dictionary of tensors. Download it again.")
    return tensors
