"""Loading for inference, and the words when a folder is not what it should be."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.arguments import parse_arguments
from finetune.errors import UserError
from finetune.frozen import FEW_ROWS
from finetune.identity import adapter_fingerprint, check_adapter, fingerprint
from finetune.models import check_model_dir, default_dtype, load_for_inference, load_tokenizer, refuse_unseen_card
from finetune.prepare import compute_dtype, training_arguments
from qwen_qlora.component.utils import ModelUtils
from tests.adapters import make_adapter

IDS = torch.tensor([[5, 17, 300, 42, 7]])


@pytest.fixture(scope="module")
def adapter(tiny_qwen, tmp_path_factory):
    """A LoRA adapter with random weights on the tiny model."""
    return make_adapter(tiny_qwen, tmp_path_factory.mktemp("models") / "adapter")


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS).logits[0].float()


def test_base_adapter_and_four_bits(tiny_qwen, adapter):
    base, tokenizer = load_for_inference(tiny_qwen)
    assert base.dtype == torch.float32 and not base.training
    assert tokenizer.decode(tokenizer("你好", add_special_tokens=False)["input_ids"]) == "你好"
    adapted, _ = ModelUtils.load_model(str(tiny_qwen), adapter_name_or_path=str(adapter))
    assert (logits(base) - logits(adapted)).abs().max() > 0.01
    with adapted.disable_adapter():
        assert torch.equal(logits(base), logits(adapted))
    quantised, _ = ModelUtils.load_model(str(tiny_qwen), load_in_4bit=True, adapter_name_or_path=str(adapter))
    from bitsandbytes.nn import Linear4bit

    assert isinstance(quantised.get_base_model().model.layers[0].mlp.up_proj.base_layer, Linear4bit)
    difference = (logits(quantised) - logits(adapted)).abs().max()
    assert 0 < difference < 0.5 * logits(adapted).abs().max()
    half, _ = load_for_inference(tiny_qwen, dtype="bfloat16")
    assert half.dtype == torch.bfloat16


def test_folders_that_hold_no_model(tmp_path, tiny_qwen_original):
    with pytest.raises(UserError, match="nothing there. Run `make qwen-download`"):
        check_model_dir(tmp_path / "missing")
    with pytest.raises(UserError, match="no config.json"):
        check_model_dir(tmp_path)
    with pytest.raises(UserError, match="python -m finetune.checkpoint"):
        check_model_dir(tiny_qwen_original)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(UserError, match="expected weights"):
        check_model_dir(tmp_path)


def test_fingerprints_tell_weights_apart_and_not_how_they_are_stored(tiny_qwen, tmp_path):
    tensors = {}
    for file in tiny_qwen.glob("*.safetensors"):
        tensors |= load_file(file)
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) == fingerprint(tiny_qwen)
    weight = tensors["model.layers.1.mlp.up_proj.weight"]
    weight[weight.shape[0] // 2, 0] += 0.01
    save_file(tensors, tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) != fingerprint(tiny_qwen)


def test_an_adapter_fingerprint_knows_alpha(adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    assert adapter_fingerprint(copy) == adapter_fingerprint(adapter)
    change_config(copy, lora_alpha=99)
    assert adapter_fingerprint(copy) != adapter_fingerprint(adapter)


def change_config(adapter_dir, **settings):
    path = adapter_dir / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def other_base(tiny_qwen, tmp_path):
    """A model of the same shapes and name, with one weight matrix changed."""
    folder = shutil.copytree(tiny_qwen, tmp_path / "elsewhere" / tiny_qwen.name)
    for file in folder.glob("*.safetensors"):
        save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file)
    return folder


def test_an_adapter_of_another_base_is_refused(tiny_qwen, other_base, adapter, tmp_path):
    with pytest.raises(UserError, match="was trained on"):
        load_for_inference(other_base, adapter)
    moved = shutil.copytree(tiny_qwen, tmp_path / "moved")
    check_adapter(adapter, moved)  # the same weights in another place are the same base

    # where the base of old is gone: its name decides, unless training left a record of its weights
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    change_config(copy, base_model_name_or_path=f"/gone/{tiny_qwen.name}")
    check_adapter(copy, other_base)
    with pytest.raises(UserError, match="/gone"):
        check_adapter(copy, moved)
    marker = {"identity": {"base_model": fingerprint(tiny_qwen)}}
    (copy / "complete.json").write_text(json.dumps(marker))
    check_adapter(copy, moved)
    with pytest.raises(UserError, match="was trained on"):
        check_adapter(copy, other_base)


def test_an_adapter_of_another_shape_is_refused(tiny_qwen, adapter, tmp_path):
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(copy / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("lora_A.weight"))
    save_file(tensors | {name: tensors[name][:, 1:].contiguous()}, copy / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit"):
        check_adapter(copy, tiny_qwen)


def test_a_folder_without_adapter_names_the_step(tiny_qwen, tmp_path):
    with pytest.raises(UserError, match="make qwen-train"):
        load_for_inference(tiny_qwen, tmp_path)


def test_the_step_that_makes_a_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_MODULE_MODEL_PATH", str(tmp_path / "final"))
    monkeypatch.setenv("QWEN_MERGED_DIR", str(tmp_path / "merged"))
    monkeypatch.setenv("BAICHUAN_MODEL_DIR", str(tmp_path / "base"))
    steps = {"final": "baichuan-train", "merged": "qwen-merge", "base": "baichuan-download", "x": "qwen-download"}
    for name, step in steps.items():
        with pytest.raises(UserError, match=f"Run `make {step}`"):
            check_model_dir(tmp_path / name)


def test_a_card_that_torch_does_not_see_is_no_reason_to_use_the_processor(tiny_qwen, tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: NVIDIA A40 (UUID: GPU-1)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match=r"has a card \(GPU 0: NVIDIA A40\), but torch .* does not see it.*make doctor"):
        refuse_unseen_card()
    with pytest.raises(UserError, match="does not see it"):
        compute_dtype(False)
    with pytest.raises(UserError, match="does not see it"):
        load_for_inference(tiny_qwen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")  # the processor is meant
    assert compute_dtype(False) == "float32"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no driver'; exit 9\n")
    assert compute_dtype(False) == "float32"


def test_inference_and_training_take_the_same_16_bits(monkeypatch):
    """torch says of a V100 that it supports bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((7, 0), "float16"), ((7, 5), "float16"), ((8, 6), "bfloat16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_, found=capability: found)
        assert default_dtype() == compute_dtype(True) == name


def test_one_process_does_not_train_on_several_cards(monkeypatch):
    """transformers would deal a batch's rows out to them; the launchers say which rank a process is."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(UserError, match="one process sees 2 cards.*make qwen-train.*CUDA_VISIBLE_DEVICES=0"):
        training_arguments(parse_arguments(["--train_file", "rows", "--output_dir", "there"]), "bfloat16")


def kept_share(layer, spread, rows_at_once=2100):
    """How much of an adapter's term, `spread` of the base's output, comes through a projection in bfloat16."""
    x = torch.randn(2100, layer.in_features, dtype=torch.bfloat16)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    term = layer.scaling["default"] * (x.float() @ a.float().T) @ b.float().T
    with torch.inference_mode():
        output = torch.cat([layer(rows) for rows in x.split(rows_at_once)])
        change = output.float() - layer.get_base_layer()(x).float()
        size = layer.get_base_layer()(x).float().std()
    assert term.std() < spread * size, (term.std(), size)
    return ((change * term).sum() / term.square().sum()).item()


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_an_adapters_small_terms_are_kept(tiny_qwen, tmp_path, load_in_4bit):
    """In 16 bits peft adds them to rounded outputs; what the layer gives here is what it gave in training."""
    adapter = make_adapter(tiny_qwen, tmp_path / "adapter", spread=5e-5)
    model, _ = load_for_inference(tiny_qwen, adapter, load_in_4bit, dtype="bfloat16")
    layer = model.base_model.model.model.layers[1].mlp.gate_proj
    torch.manual_seed(0)
    assert kept_share(layer, 2e-3) == pytest.approx(1, abs=0.1)
    assert kept_share(layer, 2e-3, rows_at_once=FEW_ROWS - 1) == pytest.approx(1, abs=0.1)  # a step of decoding
    layer.forward = layer._peft_forward
    assert kept_share(layer, 2e-3) < 0.5


def test_an_adapter_in_16_bits_can_be_switched_off_and_merged(tiny_qwen, tmp_path):
    adapter = make_adapter(tiny_qwen, tmp_path / "adapter")
    model, _ = load_for_inference(tiny_qwen, adapter, dtype="bfloat16")
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        adapted, base = (
            model(input_ids=ids).logits,
            load_for_inference(tiny_qwen, dtype="bfloat16")[0](input_ids=ids).logits,
        )
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids).logits, base)
        assert torch.equal(model(input_ids=ids).logits, adapted) and not torch.equal(adapted, base)
        merged = model.merge_and_unload()(input_ids=ids).logits
    assert (merged - adapted).float().std() < 0.1 * (adapted - base).float().std()


def test_folder_whose_copy_was_cut(tmp_path, tiny_qwen, tiny_baichuan):
    for number, model in enumerate((tiny_qwen, tiny_baichuan)):
        folder = shutil.copytree(model, tmp_path / str(number))
        weights = sorted(folder.glob("*.safetensors"))[-1]
        content = weights.read_bytes()
        weights.write_bytes(content[:-100])
        with pytest.raises(UserError, match="expected .* bytes, found"):
            load_for_inference(folder)
        weights.unlink()
        with pytest.raises(UserError, match="weight files are missing|expected weights"):
            load_for_inference(folder)
        weights.write_bytes(content)
        (folder / "tokenizer.json").unlink()
        with pytest.raises(UserError, match="expected a tokenizer"):
            load_tokenizer(folder)


def test_few_rows_in_4_bits_have_the_bias(tiny_qwen, tmp_path):
    model, _ = load_for_inference(tiny_qwen, make_adapter(tiny_qwen, tmp_path / "adapter"), True, dtype="bfloat16")
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    bias = layer.get_base_layer().bias
    bias.data.fill_(3)
    with torch.inference_mode():
        output = layer(torch.zeros(1, layer.in_features, dtype=torch.bfloat16))
    assert torch.equal(output[0], bias.to(torch.bfloat16))
