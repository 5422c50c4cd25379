"""What cannot be converted exactly is refused with its reason, before anything is written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoint.convert import convert_checkpoint
from finetune.errors import UserError


@pytest.fixture
def qwen(tmp_path, tiny_qwen_original):
    return shutil.copytree(tiny_qwen_original, tmp_path / "in")


@pytest.fixture
def baichuan(tmp_path, tiny_baichuan_original):
    return shutil.copytree(tiny_baichuan_original, tmp_path / "in")


def change_json(path, **values):
    """Set keys; a value of None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def refusal(source):
    target = source.parent / "out"
    with pytest.raises(UserError) as caught:
        convert_checkpoint(source, target)
    assert not target.exists() and not (source.parent / "out.partial" / "conversion_manifest.json").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": None, "n_embd": 64, "n_layer": 2}, "August 2023"),
        ({"no_bias": False}, "no_bias is False, expected True"),
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25, expected 1.0"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"emb_dropout_prob": 0.1}, "emb_dropout_prob is 0.1"),
        ({"kv_channels": 8}, "kv_channels x num_attention_heads = hidden_size"),
        ({"intermediate_size": 255}, "even intermediate_size"),
        ({"seq_length": None}, "must have seq_length"),
        ({"intermediate_size": 128}, "transformer.h.0.mlp.w1.weight has shape (128, 64), config.json wants (64, 64)"),
        ({"num_hidden_layers": 3}, "8 tensors missing for Qwen-1, first transformer.h.2."),
        ({"num_hidden_layers": 1}, "8 unknown tensors for Qwen-1, first transformer.h.1."),
        ({"quantization_config": {"bits": 4}}, "quantised checkpoint"),
        ({"model_type": "chatglm"}, "model_type 'chatglm'"),
        ({"model_type": None}, "model_type None"),
    ],
)
def test_qwen_configs(qwen, changes, reason):
    change_json(qwen / "config.json", **changes)
    assert reason in refusal(qwen)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 64000}, "Baichuan-1"),
        ({"architectures": ["BaiChuanForCausalLM"]}, "Baichuan-1"),
        ({"max_position_embeddings": None}, "ALiBi"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings false"),
        ({"rms_norm_eps": None}, "must have rms_norm_eps"),
        ({"num_attention_heads": 5}, "not a multiple of 5 heads"),
    ],
)
def test_baichuan_configs(baichuan, changes, reason):
    change_json(baichuan / "config.json", **changes)
    assert reason in refusal(baichuan)


def change_shard(folder, number, change):
    path = sorted(folder.glob("model-*.safetensors"))[number]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_unknown_tensor(qwen):
    change_shard(qwen, 0, lambda tensors: tensors.update({"transformer.h.0.attn.c_proj.bias": torch.zeros(64)}))
    assert "1 unknown tensors for Qwen-1, first transformer.h.0.attn.c_proj.bias" in refusal(qwen)


def test_buffers_of_older_code_are_dropped(qwen):
    def add(tensors):
        tensors["transformer.rotary_emb.inv_freq"] = torch.zeros(8)

    change_shard(qwen, 0, add)
    target = convert_checkpoint(qwen, qwen.parent / "out")
    assert "inv_freq" not in (target / "model.safetensors.index.json").read_text()


def test_missing_tensor(qwen):
    change_shard(qwen, 2, lambda tensors: tensors.pop("lm_head.weight"))
    assert "the index places lm_head.weight in model-00003-of-00003.safetensors, found it in no file" in refusal(qwen)


def test_tensor_in_two_files(qwen):
    change_shard(qwen, 0, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(4, 64)}))
    message = refusal(qwen)
    assert "lm_head.weight stands in model-00001-of-00003.safetensors and in model-00003-of-00003" in message


def test_integer_tensor(qwen):
    change_shard(qwen, 2, lambda tensors: tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}))
    assert "lm_head.weight is I8, expected BF16, F16, F32" in refusal(qwen)


def test_missing_shard(qwen):
    (qwen / "model-00002-of-00003.safetensors").unlink()
    assert "1 of 3 weight files are missing, first model-00002-of-00003.safetensors" in refusal(qwen)


def test_torn_shard(qwen):
    path = qwen / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert str(path) in refusal(qwen)


def test_torn_pickle(baichuan):
    path = baichuan / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "expected a complete PyTorch file" in refusal(baichuan)


def test_pickle_with_code_is_not_run(baichuan):
    class Harmful:
        def __reduce__(self):
            return (open, (str(baichuan / "harm"), "w"))

    torch.save({"model.norm.weight": Harmful()}, baichuan / "pytorch_model.bin")
    assert "tensors alone" in refusal(baichuan)
    assert not (baichuan / "harm").exists()


@pytest.mark.parametrize(
    ("file", "reason"),
    [("config.json", "which model this is"), ("model-00001-of-00003.safetensors", "1 of 3 weight files are missing")],
)
def test_missing_files(qwen, file, reason):
    (qwen / file).unlink()
    assert reason in refusal(qwen)


def test_no_weights_at_all(qwen):
    for path in [*qwen.glob("model*")]:
        path.unlink()
    assert "has no weights" in refusal(qwen)


def test_missing_vocabulary(qwen):
    (qwen / "qwen.tiktoken").unlink()
    assert "qwen.tiktoken is missing" in refusal(qwen)
    assert not (qwen.parent / "out.partial").exists()


def test_vocabulary_of_another_model(qwen):
    lines = (qwen / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (qwen / "qwen.tiktoken").write_bytes(b"".join(lines[:1000]))
    assert "in qwen.tiktoken the special tokens are 1000..1207" in refusal(qwen)


def test_foreign_target(qwen):
    (qwen.parent / "out").mkdir()
    (qwen.parent / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no finished conversion"):
        convert_checkpoint(qwen, qwen.parent / "out")
    assert (qwen.parent / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("is_list", [False, True])
def test_stops_of_a_fine_tuned_qwen_are_taken(qwen, is_list):
    """A list, or none: the conversion writes its own."""
    path = qwen / "generation_config.json"
    known = json.loads(path.read_text())["eos_token_id"]
    ids = [known, known + 1] if is_list else None
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": ids, "pad_token_id": None}))
    target = qwen.parent / "out"
    convert_checkpoint(qwen, target)
    assert len(json.loads((target / "generation_config.json").read_text())["eos_token_id"]) == 3


def test_a_baichuan_config_without_architectures_is_converted(baichuan):
    path = baichuan / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": None}))
    convert_checkpoint(baichuan, baichuan.parent / "out")
    assert (baichuan.parent / "out" / "conversion.json").exists()
