"""Writes the files a fast tokenizer is loaded from."""

import json
from pathlib import Path
from typing import Any


def write_tokenizer_files(target: Path, tokenizer: Any, settings: dict[str, Any], chat_template: str) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into target.

    The class is named PreTrainedTokenizerFast, which transformers 4 and 5 both know and which takes tokenizer.json as
    it stands; classes such as LlamaTokenizer rebuild parts of it by their own rules.
    """
    tokenizer.save(str(target / "tokenizer.json"))
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
    }
    text = json.dumps(common | settings, ensure_ascii=False, indent=2, sort_keys=True)
    (target / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
    (target / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
