"""The training benchmark, run for real with tiny models: equal losses, missing peers named, finished runs skipped."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import bench_train, random_model, small_terms, train_layers, train_plan, train_runs
from benchmarks.random_model import SHAPES, build
from benchmarks.train_rows import Workload, draw_lengths, write_rows
from benchmarks.train_table import table
from finetune.errors import UserError
from finetune.memory import KNOWN_SHAPES
from tests.tiny.session import build_once

NAMES = "qlora,padded-4,unsloth-4096,full"


def run_tiny(folder: Path, *more: str) -> None:
    bench_train.main([str(folder), "--size", "tiny", "--only", NAMES, *more])


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a benchmark that ran once, in processes of its own."""
    return build_once(tmp_path_factory, "bench", run_tiny)


@pytest.fixture
def results(bench: Path) -> dict[str, dict]:
    return {line["name"]: line for line in bench_train.read_results(bench / "results.jsonl")}


def test_losses_and_gradients_are_those_of_the_padded_peer(results):
    ours, padded = results["qlora"], results["padded-4"]
    assert len(ours["losses"]) == 5 and ours["losses"] == pytest.approx(padded["losses"], abs=5e-4)
    assert ours["grad_norms"] == pytest.approx(padded["grad_norms"], rel=1e-3)
    assert max(ours["losses"]) - min(ours["losses"]) > 0.05  # they move, so that equal ones say something


def test_a_result_says_where_how_and_how_fast(results):
    for name in ("qlora", "padded-4", "full"):
        result = results[name]
        assert result["status"] == "done" and result["tokens_per_second"] > 0 and result["device"] == "cpu"
        assert result["versions"]["torch"] and result["product_rate_tflops"] > 0 and result["seconds_to_load"] > 0
        assert result["updates"] == 5 and len(result["speeds"]) == 2
    full, shape = results["full"], SHAPES["tiny-baichuan2"]
    assert full["tflops"] == pytest.approx(6 * shape.parameters * full["tokens_per_second"] / 1e12, abs=1e-4)
    assert full["losses"][0] == pytest.approx(math.log(shape.vocabulary), rel=0.1)
    assert full["token_budget"] and full["layers_kept"] == 2 and full["predicted"]["peak_memory_gib"] > 0
    assert "llm_code/training_config/baichuan2_config.json" in full["command"]


def test_a_missing_peer_is_named_and_stops_no_other(bench, results):
    assert results["unsloth-4096"]["status"] == "unsloth is not installed"
    text = (bench / "table.md").read_text()
    assert "- unsloth-4096: unsloth is not installed" in text
    assert "| padded-4 |" in text and "| full |" in text
    assert (bench / "bench_train.png").read_bytes().startswith(b"\x89PNG")


def test_resume_skips_what_is_done(bench, monkeypatch):
    begun = []

    def measure(run, *_):
        begun.append(run.name)
        return {"name": run.name, "group": run.group, "status": "not begun", "date": "2026-01-01"}

    monkeypatch.setattr(bench_train, "measure", measure)
    results = (bench / "results.jsonl").read_text()
    run_tiny(bench, "--resume", "--rounds", "2")
    # Round 1 lacks the peer that is not installed, round 2 everything; rounds are interleaved.
    assert begun == ["unsloth-4096", *NAMES.split(",")]
    (bench / "results.jsonl").write_text(results)


def test_a_run_that_fails_says_why(bench, capsys):
    run_tiny(bench, "--results", str(bench / "failed"), "--only", "qlora", "--memory_limit", "a lot")
    (line,) = bench_train.read_results(bench / "failed" / "results.jsonl")
    assert "unknown argument --memory_limit" in line["status"]
    assert "- qlora: unknown argument --memory_limit" in capsys.readouterr().out


def test_the_table_compares_medians_with_ours():
    common = {"group": "QLoRA", "status": "done", "device": "card", "tflops": 350, "date": "2026-01-01"}
    common |= {"predicted": {}, "token_budget": None, "layers_kept": None, "peak_memory_gib": 9.5, "versions": {}}
    common |= {"product_rate_tflops": 700, "git_commit": "abc", "seconds_to_load": 3, "value": None}
    speeds = [(1, 7), (1, 900), (2, 1000), (3, 5000)]  # of a round that was repeated the last counts
    common["losses"] = [2.0, 2.0, 3.0]
    ours = [common | {"name": "qlora", "round": i, "tokens_per_second": speed} for i, speed in speeds]
    peer = {"name": "padded-4", "round": 1, "tokens_per_second": 250, "losses": [2.001, 2.0, 2.9], "git_commit": "def"}
    text = table([*ours, common | peer])
    assert "Commit abc, def, 2026-01-01." in text
    assert "| padded-4 | 250 | - | 4.00 | 50.0 % | 9.5 | - | - | - | 1.0e-03 | 1.0e-01 | 3 |" in text
    assert "| qlora | 1,000 | 900 to 5,000 | - |" in text
    assert "2026-01-01 to 2026-01-03." in table([*ours, common | peer | {"date": "2026-01-03"}])
    common |= {"group": "cards", "model": "qwen-14b", "round": 1, "rows_per_update": 64}
    one = common | {"name": "qlora-x1", "gpus": 1, "tokens_per_second": 1000}
    two = common | {"name": "qlora-x2", "gpus": 2, "tokens_per_second": 1900, "tflops": 665}
    twice = two | {"name": "qlora-x2-twice", "rows_per_update": 128}
    text = table([line | {"git_commit": "abc"} for line in (one, two, twice)])
    assert "| qlora-x1 | 1,000 | - | - | 50.0 % |" in text
    assert "| qlora-x2 | 1,900 | - | 1.90 | 47.5 % | 9.5 | - | - | - | 0.0e+00 | 0.0e+00 | 3 |" in text
    assert "| qlora-x2-twice | 1,900 | - | 1.90 | 47.5 % | 9.5 | - | - | - | - | - | 3 |" in text


def test_layers_are_measured_in_several_ways_and_one_that_fails_stops_no_other(tmp_path, monkeypatch, capsys):
    words = [str(tmp_path), "--model", "tiny-qwen", "--tokens", "64", "--ways", "cuda-graph,shipped,16-bit-base"]
    monkeypatch.setattr("sys.argv", ["train_layers", *words])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train_layers.main()
    graph, shipped, dense = bench_train.read_results(tmp_path / "results.jsonl")
    assert "CUDA" in graph["error"] and "ms" not in graph
    assert shipped["ms"] > 0 and dense["ready_s"] > 0
    assert shipped["gradient_norm"] == pytest.approx(dense["gradient_norm"], rel=1e-6)
    assert "| 16-bit-base | 64 |" in capsys.readouterr().out


def test_float32_computes_what_ours_does(bench, tmp_path):
    """16-bit arithmetic and float32: the same losses but for rounding, and different ones."""
    flags = ["--results", str(tmp_path), "--only", "qlora,float32", "--fp16", "false", "--bf16", "true"]
    bench_train.main([str(bench), "--size", "tiny", *flags])
    ours, exact = bench_train.read_results(tmp_path / "results.jsonl")
    assert ours["losses"] == pytest.approx(exact["losses"], abs=1e-3) and ours["losses"] != exact["losses"]


def test_two_ranks_take_the_rows_of_one(bench, results, tmp_path):
    """The same updates dealt out to two have the losses of one process."""
    bench_train.main([str(bench), "--size", "tiny", "--results", str(tmp_path), "--only", "qlora-x2"])
    (two,) = bench_train.read_results(tmp_path / "results.jsonl")
    assert (two["status"], two["gpus"], results["qlora"]["gpus"]) == ("done", 2, 1)
    assert two["losses"] == pytest.approx(results["qlora"]["losses"], abs=1e-5)


def test_ranks_are_started_as_the_shipped_scripts_start_them():
    runs = train_plan.all_runs(is_tiny=False)
    two, zero = (" ".join(train_runs.command_of(runs[name], ["--flag"])) for name in ("qlora-x2", "zero-3-x2"))
    assert "-m finetune.launch" in two and "torch.distributed.run --standalone --nproc_per_node 2" in two
    assert two.endswith("-m qwen_qlora.train_qlora --flag") and "--num_gpus 2" in zero
    assert zero.endswith("--no_local_rank --module llm_code.train --flag")
    flags = train_plan.training_flags(runs["zero-3-x2"], "model", "rows", "output")
    assert flags[flags.index("--per_device_train_batch_size") + 1] == "24"
    assert (train_runs.REPOSITORY / flags[flags.index("--deepspeed") + 1]).exists()


def test_in_float32_all_compute_the_same(bench, tmp_path):
    """Whatever is asked for: bf16 in the flags changes nothing."""
    ours, padded = "exact-qlora-14b", "exact-padded-4-14b"
    flags = ["--results", str(tmp_path), "--only", f"{ours},{padded}", "--fp16", "false", "--bf16", "true"]
    bench_train.main([str(bench), "--size", "tiny", *flags])
    lines = bench_train.read_results(tmp_path / "results.jsonl")
    assert lines[0]["losses"] == pytest.approx(lines[1]["losses"], abs=1e-5)
    text = (tmp_path / "table.md").read_text()
    assert f"| update | {ours} | {padded} |" in text and f"| 1 | {lines[0]['losses'][0]:.4f} |" in text
    worst = text.split("| worst |")[1].split("|")
    assert float(worst[0]) < 1e-5 and worst[1].strip() == "-"


def test_what_an_adapter_adds_is_told_by_projection_and_way(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["small_terms", "--model", "tiny-qwen", "--tokens", "64"])
    small_terms.main()
    rows = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines() if "_proj" in line]
    named = [(name.strip(), way.strip()) for name, way, _ in rows]
    ways = ("ours", "adapter first", "base first")
    assert named == [(name, way) for name in ("q_proj", "o_proj", "gate_proj", "down_proj") for way in ways]
    assert all(float(share) > 0.5 for (_, way), (*_, share) in zip(named, rows, strict=True) if way == "ours")


def test_unknown_flags_go_to_training():
    flags, more = bench_train.parse(["--only", "full", "--tokens_per_micro_batch", "4096", "--rounds", "2"])
    assert (flags.folder, flags.only, flags.rounds) == (bench_train.DEFAULT_FOLDER, "full", 2)
    assert more == ["--tokens_per_micro_batch", "4096"]
    assert bench_train.parse(["here", "--list"])[0].folder == Path("here")


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="unknown run qlora-1"):
        bench_train.main(["--only", "qlora-1"])
    with pytest.raises(UserError, match="unknown shape qwen-99b"):
        build(Path("nowhere"), "qwen-99b")
    with pytest.raises(UserError, match="--updates must be more than the 3 that warm up, got 3"):
        bench_train.main(["--size", "tiny", "--updates", "3"])


def test_the_list_names_every_run(capsys):
    bench_train.main(["--size", "real", "--list"])
    listed = capsys.readouterr().out.splitlines()
    assert {"qlora", "padded-16", "full", "length-8192", "rank-256", "size-qwen2.5-32b"} <= {
        line.split()[0] for line in listed
    }


@pytest.mark.parametrize("workload, mean", [(Workload(165, 32, 1024, 64), 165), (Workload(330, 64, 1024, 48), 330)])
def test_lengths_are_lognormal_within_their_limits(workload, mean):
    lengths = draw_lengths(workload, 20000)
    assert sum(lengths) / len(lengths) == pytest.approx(mean, rel=0.04)
    assert (min(lengths), max(lengths)) == (workload.shortest, workload.longest)


@pytest.mark.parametrize("model", ["tiny-qwen", "tiny-baichuan2"])
def test_a_rows_tokens_are_counted_with_the_template(bench, model, tmp_path):
    """Encoded as training encodes them; what the template writes counts, and one word is one token."""
    from transformers import AutoTokenizer

    from finetune.conversation import encode_rows
    from finetune.rows import read_rows

    tokenizer = AutoTokenizer.from_pretrained(build(bench / "models" / model, model))
    workload = Workload(48, 32, 96, 8)
    samples, report = encode_rows(tokenizer, read_rows(write_rows(tmp_path, model, workload, 50)), 1024)
    assert [len(sample.input_ids) for sample in samples] == draw_lengths(workload, 50) and not report.num_cut
    assert len({token for sample in samples for token in sample.input_ids}) > 300


def test_a_random_model_is_complete_and_left_alone(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(random_model, "SHARD_BYTES", 100_000)
    for name in ("tiny-qwen", "tiny-baichuan2"):
        folder = build(tmp_path / name, name)
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loaded.values()) and model.num_parameters() == SHAPES[name].parameters
        drawn = model.model.layers[1].mlp.up_proj.weight.float()
        assert drawn.std().item() == pytest.approx(0.02, rel=0.1) and abs(drawn.mean()) < 0.002
        files = sorted(folder.glob("*.safetensors"))
        before = files[0].stat().st_mtime_ns
        assert len(files) > 2 and build(folder, name) == folder and files[0].stat().st_mtime_ns == before
    assert set(KNOWN_SHAPES) <= set(SHAPES)


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    shape = replace(SHAPES["qwen-14b"], layers=10**7)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="qwen-14b needs .* GB are free"):
        patch.setitem(SHAPES, "qwen-14b", shape)
        build(tmp_path / "model", "qwen-14b")


def test_a_run_past_its_limit_is_killed(tmp_path):
    ended = train_runs.execute(["sleep", "60"], tmp_path / "log", 0.3)
    assert ended.status != 0 and ended.lines[-1] == "killed after 0 s"


def test_the_sweep_over_rows_measures_the_data_alone(bench, tmp_path, capsys):
    bench_train.main([str(tmp_path), "--size", "tiny", "--only", "rows-1000"])
    (line,) = bench_train.read_results(tmp_path / "results.jsonl")
    assert line["rows"] == 1000 and line["tokens"] == pytest.approx(48_000, rel=0.1)
    assert set(line["stage_seconds"]) == {"read", "encode", "plan", "collate"} and line["rows_per_second"] > 0
    assert "| 1,000 |" in capsys.readouterr().out
