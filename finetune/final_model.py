"""A folder of trained weights made complete by itself: config, tokenizer, template, licences, notice; and its check.

    python -m finetune.final_model FOLDER      # load it as anyone would, in a fresh process, and ask it for logits

Writes into the folder it is given. Exit status 2 when the check fails.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from finetune.errors import UserError, run_main
from finetune.norm_head import fold_head
from finetune.tensor_files import INDEX, copy_besides_weights

TRAINED = """\
# Trained files

All weights of this folder were trained from those in `{base}`, by this project's `llm_code.train`.
`train_args.json` says how, `train_report.json` what came of it. The configuration, the tokenizer and its chat template
are the base model's.{norm_head}
"""
NORM_HEAD = " The rows of `lm_head.weight` are L2-normalised, as they were in every pass of the training."


def complete(folder: Path, base_dir: str | Path, norm_head: bool) -> None:
    """Add to trained weights what `base_dir` has besides weights, fold a NormHead in, make everything readable."""
    base_dir = Path(base_dir)
    if norm_head:
        fold_head(folder)
    copy_besides_weights(base_dir, folder, INDEX, "config.json", "CONVERTED.md", "TRAINED.md")
    _write_config(folder, base_dir)
    _write_notice(folder, base_dir, norm_head)
    for path in folder.iterdir():
        path.chmod(0o644)


def _write_config(folder: Path, base_dir: Path) -> None:
    """The base's own config.json with the dtype of these weights, under both of its names."""
    from safetensors import safe_open

    from finetune.tensor_files import shard_files

    with safe_open(shard_files(folder)[0], framework="pt") as tensors:
        dtype = str(tensors.get_tensor(next(iter(tensors.keys()))).dtype).removeprefix("torch.")
    config = json.loads((base_dir / "config.json").read_text(encoding="utf-8"))
    config.update({name: dtype for name in ("dtype", "torch_dtype") if name in config or name == "dtype"})
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _write_notice(folder: Path, base_dir: Path, norm_head: bool) -> None:
    text = TRAINED.format(base=base_dir.name, norm_head=NORM_HEAD if norm_head else "")
    converted = base_dir / "CONVERTED.md"
    if converted.exists():
        text += "\nThe base had been converted before that. Its own notice:\n\n"
        text += "".join(f"> {line}".rstrip() + "\n" for line in converted.read_text(encoding="utf-8").splitlines())
    (folder / "TRAINED.md").write_text(text, encoding="utf-8")


def check_in_fresh_process(folder: str | Path) -> str:
    """What the check prints. Raises UserError when the folder does not load or answers nonsense."""
    command = [sys.executable, "-m", "finetune.final_model", str(folder)]
    keep = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, env=keep, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().removeprefix("error: ") or f"exit status {done.returncode}"
        raise UserError(f"{folder} does not pass its check: {why}")
    return done.stdout.strip()


def check(folder: Path) -> str:
    """Load model and tokenizer with plain transformers, no remote code, and look at the logits of a short chat."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", local_files_only=True, output_loading_info=True
    )
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise UserError(f"weights and configuration disagree: {_shortened(wrong)}.")
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    messages = [{"role": "user", "content": "你好"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        logits = model(ids.to(model.device)).logits
    if not torch.isfinite(logits).all():
        raise UserError("its logits are not finite numbers. Train again from an earlier checkpoint.")
    return f"{type(model).__name__}, {model.num_parameters():,} parameters in {model.dtype}: loads and answers"


def _shortened(wrong: dict[str, Any]) -> str:
    return "; ".join(f"{name}: {', '.join(map(str, list(keys)[:3]))}" for name, keys in wrong.items())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a complete model")
    print(check(parser.parse_args().folder))


if __name__ == "__main__":
    run_main(main)
