"""Which way of training fits these cards and is cheapest: none, 1, 2, 3, 2-offload or 3-offload.

    python -m llm_code.choose_stage --num_gpus 2 --train_args_file llm_code/training_config/baichuan2_config.json

Prints the name to stdout and the reason to stderr; what it is not told it finds as finetune.plan does. A run that has a
checkpoint goes on with that checkpoint's stage. Exit status 2 when nothing fits.
"""

import argparse
import math
import sys
from collections.abc import Sequence

from finetune.arguments import Arguments, parse_arguments, require
from finetune.errors import UserError, run_main
from finetune.gpus import GIB
from finetune.memory import total
from finetune.plan import advice, hours, shape_of, workload
from finetune.plan import gpus_here as find_cards
from finetune.plan_options import Option, choose, full_options, usable_bytes
from finetune.saving import free_host_memory, newest_checkpoint, read_marker


def choose_stage(arguments: Arguments, num_gpus: int, has_several_machines: bool = False) -> tuple[str, str]:
    """(name, reason). Several machines leave DeepSpeed's stages alone. Raises UserError when no way fits."""
    newest, _ = newest_checkpoint(arguments.train.output_dir) if arguments.train.output_dir else (None, [])
    stage = (read_marker(newest) or {}).get("stage") if newest else None
    if stage:
        return stage, f"{newest} was written with it"
    gpu, _ = find_cards()
    if gpu is None:
        return ("1", "no card here, several processes") if num_gpus > 1 else ("none", "no card here, one process")
    require(arguments, model_name_or_path="Set BAICHUAN_MODEL_DIR in .env.")
    shape, work = shape_of(arguments.model.model_name_or_path), workload(arguments, num_gpus, None, None)
    options = full_options(shape, gpu, num_gpus, arguments.train, work)
    options = [option for option in options if option.name != "none" or not has_several_machines]
    # Offloading that the training would refuse is no way; of other machines nothing is known.
    free = math.inf if has_several_machines else free_host_memory() or math.inf
    chosen = choose([option for option in options if option.host_bytes <= free])
    if chosen is None:
        least = min((option.host_bytes for option in options if option.budget), default=0)
        if not least:
            raise UserError(advice("full", gpu, num_gpus, shape, arguments, work))
        raise UserError(
            f"on {num_gpus} x {gpu.name} only offloading fits, with {least / GIB:.0f} GiB of main memory, "
            f"{free / GIB:.0f} are free: take a machine with more, use more cards (BAICHUAN_GPUS), or train an adapter "
            "instead (make qwen-plan)."
        )
    others = [_remark(option, free) for option in options if option is not chosen]
    usable = usable_bytes(gpu, arguments.train.memory_limit_gib)
    needs = f"{total(chosen.parts) / GIB:.0f} of {usable / GIB:.0f} GiB on each {gpu.name}"
    return chosen.name, f"{needs}, about {hours(chosen.seconds)}; {', '.join(others)}"


def _remark(option: Option, free: float) -> str:
    """Why an option is not the chosen one; `free` bytes of main memory."""
    if not option.budget:
        return f"{option.name} does not fit"
    if option.host_bytes > free:
        return f"{option.name} needs {option.host_bytes / GIB:.0f} GiB of main memory"
    return f"{option.name} would take {hours(option.seconds)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--num_gpus", type=int, required=True, help="cards, or processes where there is no card")
    parser.add_argument("--several_machines", action="store_true", help="the cards are those of several machines")
    flags, rest = parser.parse_known_args(argv)
    name, reason = choose_stage(parse_arguments(rest), flags.num_gpus, flags.several_machines)
    print(f"DEEPSPEED_STAGE=auto: {name} ({reason})", file=sys.stderr)
    print(name)


if __name__ == "__main__":
    run_main(main)
