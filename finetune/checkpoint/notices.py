"""Licences travel with the weights: copies of the source's, the attribution its licence wants, and what was changed."""

import shutil
from pathlib import Path
from types import ModuleType

LICENCE_WORDS = ("license", "licence", "notice", "许可")

CHANGED = """\
# Converted files

This folder is a modified form of a {title} checkpoint. It was made by this project's `finetune.checkpoint` from the
files in `{source}`; no tensor was trained or quantised. What was changed:

- The weights were renamed and cut into the tensors of `{architecture}`: the fused query-key-value matrix was split in
  three.{norm_head}
- `config.json` and `generation_config.json` were rewritten with the names current transformers reads; sampling settings
  are the source's own.
- The tokenizer was rewritten as `tokenizer.json`, with the same ids, and given a chat template that writes the
  published prompt format.
- The original model code is not needed and was left out.

{attribution}
"""
NORM_HEAD = " The rows of `lm_head.weight` were L2-normalised, as the original code does in each forward pass."


def write_notices(layout: ModuleType, source: Path, target: Path) -> None:
    """Copy the licence files and write Notice.txt and CONVERTED.md."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(word in path.name.lower() for word in LICENCE_WORDS):
            shutil.copyfile(path, target / path.name)
    attribution = layout.attribution(source)
    (target / "Notice.txt").write_text(attribution + "\n", encoding="utf-8")
    changed = CHANGED.format(
        title=layout.TITLE,
        source=source.name,
        architecture=layout.ARCHITECTURE,
        norm_head=NORM_HEAD if layout.NORM_HEAD else "",
        attribution=attribution,
    )
    (target / "CONVERTED.md").write_text(changed, encoding="utf-8")
