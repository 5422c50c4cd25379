"""The benchmarks of loading a 4-bit copy and of inference with an adapter, on a tiny model."""

import torch

from benchmarks import adapter_cost, start_up
from benchmarks.random_model import build
from finetune.models import load_for_inference


def test_a_4_bit_copy_has_the_same_weights_and_others_are_noticed(tmp_path, capsys, monkeypatch):
    start_up.main([str(tmp_path), "--repeats", "1"])
    printed = capsys.readouterr().out
    assert printed.endswith("the weights are the same\n")
    assert "| 16-bit checkpoint, quantised while loading |" in printed and "| its 4-bit copy |" in printed
    model, _ = start_up.load(tmp_path / "nf4")
    before = start_up.checksum(model)
    model.model.layers[1].mlp.up_proj.weight.data[5] ^= 1
    assert start_up.checksum(model) != before


def test_ways_of_adding_an_adapter_are_what_they_are_called(tmp_path):
    model, _ = load_for_inference(build(tmp_path, "tiny-qwen"), dtype="bfloat16")
    ids = torch.arange(40)[None]
    logits = {}
    for way, current in adapter_cost.ways_of(model):
        fused = any(hasattr(module, "_peft_forward") for module in current.modules())
        assert fused == (way == "ours")
        with torch.inference_mode():
            logits[way] = current(input_ids=ids).logits
    assert not torch.equal(logits["base alone"], logits["peft"])
    assert not torch.equal(logits["ours"], logits["peft"])


def test_the_table_has_a_line_for_each_way_and_number_of_rows(tmp_path, capsys):
    adapter_cost.main([str(tmp_path), "--rows", "1,3", "--bits", "16"])
    lines = [line.split(" | ")[:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| 16")]
    assert lines == [["| 16", way, rows] for way in ("base alone", "peft", "ours") for rows in ("1", "3")]
