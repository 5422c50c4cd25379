"""Talk to a model in the terminal: a base model, an adapter on it, or a merged model. `make qwen-chat`.

    python -m finetune.chat --model_name_or_path DIR [--adapter_name_or_path DIR] [--load_in_4bit]

The conversation itself, its commands and Ctrl-C are in finetune/terminal.py. Sampling follows the checkpoint unless
--temperature is given.
"""

import argparse
from typing import Any

from finetune.errors import UserError, run_main
from finetune.flag_types import amount, natural, positive
from finetune.terminal import Chat, converse


def checkpoint_sampling(model: Any) -> Any:
    """The sampling settings in the checkpoint's generation config, greedy where it asks for none."""
    from finetune.generate import Sampling, causal_model

    config = causal_model(model).generation_config
    penalty = config.repetition_penalty or 1.0
    if not config.do_sample:
        return Sampling(repetition_penalty=penalty)
    temperature = 1.0 if config.temperature is None else config.temperature
    top_p = 1.0 if config.top_p is None else config.top_p
    return Sampling(temperature, top_p, config.top_k or 0, penalty)


def load_chat(args: argparse.Namespace) -> Chat:
    """Load the model and make the conversation."""
    from dataclasses import replace

    from finetune.conversation import encode_prompt
    from finetune.generate import causal_model
    from finetune.models import load_for_inference
    from finetune.stream import stream_text

    model, tokenizer = load_for_inference(args.model_name_or_path, args.adapter_name_or_path, args.load_in_4bit)
    sampling = checkpoint_sampling(model)
    if args.temperature is not None:
        sampling = replace(sampling, temperature=args.temperature)
    positions = causal_model(model).config.max_position_embeddings
    context = args.context or positions
    if context > positions:
        raise UserError(f"--context {context}: the model has {positions} positions.")
    room = context - args.max_new_tokens
    if room <= 0:
        raise UserError(f"--max_new_tokens {args.max_new_tokens} leaves no room in a context of {context} tokens.")
    return Chat(
        encode=lambda messages: encode_prompt(tokenizer, messages),
        answer=lambda ids: stream_text(model, tokenizer, ids, args.max_new_tokens, sampling, args.seed),
        room=room,
    )


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder of the base or merged model")
    parser.add_argument("--adapter_name_or_path", help="folder of a LoRA adapter trained on that model")
    parser.add_argument("--load_in_4bit", action="store_true", help="NF4 weights (default: 16 bit, 32 on a CPU)")
    parser.add_argument("--max_new_tokens", type=positive, default=512, help="longest reply, in tokens (default 512)")
    parser.add_argument("--temperature", type=amount, help="0: the likeliest token (default: as the checkpoint says)")
    parser.add_argument("--context", type=natural, default=0, help="tokens of prompt and reply (default: the model's)")
    parser.add_argument("--seed", type=int, help="the same replies again (default: others every time)")
    return parser.parse_args()


def main() -> None:
    """Load and talk."""
    args = parse_args()
    converse(load_chat(args))


if __name__ == "__main__":
    run_main(main)
