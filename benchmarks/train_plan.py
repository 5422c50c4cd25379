"""The runs of benchmarks.bench_train: which program, which model, which rows, which flags.

A run of ours is the shipped command with the shipped configuration; a peer reads the same flags. The real ones are for
a card, the tiny ones show on a CPU that everything works. Speed needs no trained model, so the weights are random; in
the group `losses` a trained one learns real rows, and only its losses are looked at.
"""

from dataclasses import dataclass, replace

from benchmarks.train_rows import Workload
from finetune.errors import UserError

OURS = {
    "qlora": ("qwen_qlora.train_qlora", "qwen_qlora/config/qwen-14b-qlora.json"),
    "full": ("llm_code.train", "llm_code/training_config/baichuan2_config.json"),
}
DEEPSPEED_FILE = "llm_code/deepspeed_config/deepspeed_stage_{}_config.json"
SHORT_ROWS = Workload(165, 32, 1024, 64)  # text matching and the like
LONG_ROWS = Workload(330, 64, 1024, 48)  # conversations; the shipped configuration's rows of an update
REAL_ROWS = Workload(0, 0, 1024, 64)  # of a file: as long as they are
TINY_ROWS = Workload(48, 32, 96, 8)
TOKENS_PER_UPDATE = 16384  # in the sweep over lengths
WARM_UP = 3  # updates that warm kernels and allocator up and are left out of the speed
# The learning rate of the first update is 0, so the losses of two are those of the model as it is.
WARMUP_STEPS, UNMOVED = 2, 2
TRAINED = "smollm2-135m"  # the one model whose weights are not random (benchmarks.smollm2)
REAL_FILE = "qwen_qlora/data/keywords_data_train.jsonl"


@dataclass(frozen=True)
class Run:
    """`method` is qlora, full, or rows (no training); `peer` another program that trains the same, None for ours."""

    name: str
    group: str  # what is compared or plotted together
    method: str
    model: str
    rows: Workload
    updates: int
    flags: tuple[str, ...] = ()
    peer: str | None = None
    peer_options: tuple[str, ...] = ()
    value: float | None = None  # what a sweep varies
    train_file: str | None = None  # instead of rows of random words
    exact: bool = False  # everything in float32
    gpus: int = 1  # cards, a rank on each
    stage: str = "none"  # of ZeRO


def main_runs() -> list[Run]:
    """Ours and the peers, one after the other."""
    qlora = Run("qlora", "QLoRA", "qlora", "qwen-14b", SHORT_ROWS, 20)
    peers = replace(qlora, updates=8)
    return [
        qlora,
        replace(qlora, name="qlora-46gib", flags=("--memory_limit_gib", "46")),  # a card of 48 GB
        replace(qlora, name="qlora-fp8", flags=("--fp8_backward", "true")),
        *(
            replace(peers, name=f"padded-{rows}", peer="padded", peer_options=("--rows_at_once", str(rows)))
            for rows in (4, 16)
        ),
        *(
            replace(
                peers,
                name=f"unsloth-{tokens}",
                peer="unsloth",
                peer_options=("--tokens_at_once", str(tokens), "--recompute", recompute),
            )
            for tokens, recompute in ((4096, "none"), (6144, "none"), (8192, "unsloth"))
        ),
        replace(peers, name="float32", peer="float32", updates=4, peer_options=("--rows_at_once", "1")),
        Run("full", "all parameters", "full", "baichuan2-7b", LONG_ROWS, 16),
    ]


def sweep_runs() -> list[Run]:
    """How speed changes with one quantity; few updates each."""
    base = Run("", "", "qlora", "qwen-14b", SHORT_ROWS, 8)
    rows = replace(base, group="rows", method="rows")
    runs = [replace(rows, name=f"rows-{count}", value=count) for count in (1_000, 10_000, 100_000)]
    for length in (256, 512, 1024, 2048, 4096, 8192):
        rows = Workload(length, length, length, TOKENS_PER_UPDATE // length)
        runs.append(replace(base, name=f"length-{length}", group="length", rows=rows, value=length))
    for rank in (8, 16, 32, 64, 128, 256):
        flags = ("--lora_rank", str(rank))
        runs.append(replace(base, name=f"rank-{rank}", group="rank", flags=flags, value=rank))
    for model, billions in (("qwen-1_8b", 1.8), ("qwen-7b", 7.7), ("qwen-14b", 14.2), ("qwen2.5-32b", 32.8)):
        runs.append(replace(base, name=f"size-{model}", group="size", model=model, value=billions))
    return runs


def card_runs() -> list[Run]:
    """One card, then two: the same rows of an update dealt out to both, and for QLoRA also twice as many."""
    qlora = Run("qlora-x1", "cards", "qlora", "qwen-14b", SHORT_ROWS, 20)
    full = Run("full-x1", "cards", "full", "baichuan2-7b", LONG_ROWS, 20)
    twice = replace(SHORT_ROWS, per_update=2 * SHORT_ROWS.per_update)
    return [
        qlora,
        replace(qlora, name="qlora-x2", gpus=2),
        replace(qlora, name="qlora-x2-twice", gpus=2, rows=twice),
        full,
        replace(full, name="full-x2", gpus=2),
        *(replace(full, name=f"zero-{stage}-x2", gpus=2, stage=stage) for stage in ("1", "2", "3")),
    ]


def loss_runs() -> list[Run]:
    """Do all ways compute the same? In float32 equal losses say so; in 16 bits each rounds elsewhere.

    `float32` has the 4-bit weights rounded as the 16-bit ways read them: what these would compute without rounding.
    """
    ours = Run("losses-qlora", "losses", "qlora", TRAINED, REAL_ROWS, 20, train_file=REAL_FILE)
    padded = replace(ours, name="losses-padded-32", peer="padded", peer_options=("--rows_at_once", "32"))
    exact = {"group": "losses in float32", "exact": True}
    large = {"group": "losses in float32, 14B", "exact": True, "updates": 5}
    large |= {"model": "qwen-14b", "rows": SHORT_ROWS, "train_file": None}
    return [
        ours,
        replace(ours, name="losses-qlora-2048", flags=("--tokens_per_micro_batch", "2048")),  # several an update
        padded,
        replace(ours, name="losses-unsloth-4096", peer="unsloth", peer_options=("--recompute", "none")),
        replace(padded, name="losses-float32", peer="float32"),
        replace(ours, name="exact-qlora", **exact),
        replace(padded, name="exact-padded-32", **exact),
        replace(ours, name="exact-qlora-14b", **large),
        replace(padded, name="exact-padded-4-14b", peer_options=("--rows_at_once", "4"), **large),
    ]


def tiny(run: Run) -> Run:
    """The same run for a CPU. A learning rate at which losses move, so that equal ones say something."""
    if run.method == "rows":
        return replace(run, model="tiny-qwen", rows=TINY_ROWS)
    if run.train_file:  # the model is small as it is
        return replace(run, rows=replace(run.rows, per_update=8), updates=5)
    rows = TINY_ROWS
    if run.group == "length":
        length = run.rows.mean // 16 + 16
        rows = Workload(length, length, length, 4)
    model = "tiny-baichuan2" if run.method == "full" else "tiny-qwen"
    flags = (*run.flags, "--learning_rate", "4e-3", "--lora_dropout", "0")
    if run.method == "full":
        flags += ("--bf16", "true")  # as on a card: 16-bit weights, stochastic rounding
    return replace(run, model=model, rows=rows, updates=5, flags=flags)


def all_runs(is_tiny: bool) -> dict[str, Run]:
    """Every run by its name."""
    runs = [*main_runs(), *loss_runs(), *sweep_runs(), *card_runs()]
    return {run.name: tiny(run) if is_tiny else run for run in runs}


def chosen(runs: dict[str, Run], only: list[str], groups: list[str]) -> list[Run]:
    """The runs named by `only`, else those of the groups, else the main ones. Raises UserError for an unknown name."""
    unknown = [name for name in only if name not in runs]
    if unknown:
        raise UserError(f"unknown run {unknown[0]}. `--list` shows them.")
    if only:
        return [runs[name] for name in only]
    wanted = groups or {run.group for run in main_runs()}
    return [run for run in runs.values() if run.group in wanted]


def training_flags(run: Run, model_dir: str, train_file: str, output_dir: str) -> list[str]:
    """The flags of our command; a peer gets the same."""
    common = {
        "--train_args_file": OURS[run.method][1],
        "--model_name_or_path": model_dir,
        "--train_file": train_file,
        "--output_dir": output_dir,
        "--max_seq_length": run.rows.longest,
        "--per_device_train_batch_size": run.rows.per_update // run.gpus,
        "--gradient_accumulation_steps": 1,
        "--max_steps": run.updates,
        "--num_train_epochs": 100,
        "--logging_steps": 1,
        "--warmup_steps": WARMUP_STEPS,
        "--save_strategy": "no",
        "--report_to": "none",
        "--deepspeed": "none" if run.stage == "none" else DEEPSPEED_FILE.format(run.stage),
    }
    return [*(str(word) for pair in common.items() for word in pair), *run.flags]
