"""Try the fine-tuned model in the terminal, on the engine that the service uses too. `make baichuan-demo`.

    python -m llm_code.llm_demo.baichuan2_demo --model_name_or_path DIR [--adapter_name_or_path DIR] [--load_in_4bit]

The conversation itself, its commands and Ctrl-C are in finetune/terminal.py. Sampling follows the checkpoint unless
--temperature is given.
"""

import argparse
from collections.abc import Generator
from dataclasses import replace

from finetune.errors import UserError, run_main
from finetune.flag_types import amount, positive
from finetune.terminal import Chat, converse
from llm_code.module_interface.interface import Engine, EngineError, SamplingParams
from llm_code.module_interface.load import add_engine_arguments, load_engine, settings_of


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max_new_tokens", type=positive, default=512, help="longest reply, in tokens (default 512)")
    parser.add_argument("--temperature", type=amount, help="0: the likeliest token (default: as the checkpoint says)")
    parser.add_argument("--seed", type=int, help="the same replies again (default: others every time)")
    add_engine_arguments(parser)
    parser.set_defaults(max_batch=1)  # one person: memory for one conversation
    return parser.parse_args()


def make_chat(engine: Engine, params: SamplingParams) -> Chat:
    """A conversation on the engine. Raises UserError when the reply takes all of the context."""
    room = engine.limits.context - params.max_tokens
    if room <= 0:
        context = engine.limits.context
        raise UserError(f"--max_new_tokens {params.max_tokens} leaves no room in a context of {context} tokens.")

    def answer(prompt_ids: list[int]) -> Generator[str, None, None]:
        try:
            request = engine.submit(prompt_ids, params)
            try:
                for event in request:
                    if event.text:
                        yield event.text
            finally:
                request.cancel()
        except EngineError as error:
            raise UserError(str(error)) from error

    return Chat(encode=engine.encode_chat, answer=answer, room=room)


def main() -> None:
    """Load and talk."""
    args = parse_args()
    engine = load_engine(settings_of(args))
    try:
        params = replace(engine.defaults, max_tokens=args.max_new_tokens, seed=args.seed)
        if args.temperature is not None:
            params = replace(params, temperature=args.temperature)
        converse(make_chat(engine, params))
    finally:
        engine.close()


if __name__ == "__main__":
    run_main(main)
