"""The service over the local engine and a tiny real model (faults F33, F37, F38, F47, F48; scores as lm-eval reads
them)."""

import json
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace

import pytest

from tests.raw_http import Raw
from tests.service_process import ServiceProcess

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def service(tmp_path_factory, tiny_qwen):
    command = [sys.executable, "-m", "llm_code.service.server", "--model_name_or_path", str(tiny_qwen)]
    command += ["--port", "0", "--max_batch", "8", "--served_model_name", "tiny"]
    process = ServiceProcess(tmp_path_factory.mktemp("service") / "log", command=command)
    yield process
    assert process.stop() == 0
    assert "Traceback" not in process.log()


@pytest.fixture(scope="module")
def model(tiny_qwen):
    from finetune.models import load_for_inference

    return load_for_inference(tiny_qwen)


def complete(service, prompt, **fields):
    response = service.http.post(TEXT, json={"prompt": prompt, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def streamed(service, prompt, **fields):
    """(text, finish reason) put together from a stream's chunks."""
    response = service.http.post(TEXT, json={"prompt": prompt, "stream": True, **fields})
    *blocks, done, _ = response.text.split("\n\n")
    assert done == "data: [DONE]"
    choices = [json.loads(block.removeprefix("data: "))["choices"][0] for block in blocks]
    assert all(choice["text"] for choice in choices[:-1])
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


PROMPTS = ["睡眠", "今天心情不好，", "a b c d", "如何面对压力？请说。", "1 2 3", "焦虑", "朋友", "hello world, 你好"]


def greedy(service, prompt, length=24):
    return complete(service, prompt, temperature=0, max_tokens=length, ignore_eos=True)["text"]


def test_f37_no_end_token_an_end_token_first_and_special_tokens_alone(service, model):
    _, tokenizer = model
    endless = complete(service, "你好", max_tokens=30, ignore_eos=True)
    assert endless["finish_reason"] == "length"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    first = service.chat("你好", logit_bias={str(end): 100}, max_tokens=5, temperature=0).json()
    assert first["choices"][0]["message"]["content"] == "" and first["choices"][0]["finish_reason"] == "stop"
    special = tokenizer.convert_tokens_to_ids("<|extra_3|>")
    only = service.chat("你好", logit_bias={str(special): 100}, max_tokens=5, temperature=0).json()
    assert only["choices"][0]["message"]["content"] == "" and only["usage"]["completion_tokens"] == 5
    stream = service.chat("你好", logit_bias={str(special): 100}, max_tokens=5, temperature=0, stream=True)
    assert stream.text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in stream.text


def test_f38_stop_strings(service):
    """Wherever a stop string lies in the greedy text, the answer is that text up to its first occurrence."""
    chance, tried = random.Random(0), 0
    for prompt in PROMPTS:
        text = greedy(service, prompt)
        places = [(0, 2), (len(text) - 2, len(text)), (0, len(text))]
        places += [(begin := chance.randrange(len(text) - 1), begin + chance.randint(1, 9)) for _ in range(4)]
        for begin, end in places:
            stop = text[begin:end][:200]
            if not stop or "\ufffd" in stop:
                continue
            fields = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "stop": [stop, "never there"]}
            choice = complete(service, prompt, **fields)
            assert (choice["text"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
            assert streamed(service, prompt, **fields) == (text[: text.index(stop)], "stop")
            tried += 1
    assert tried > 30


def test_f47_f48_alone_and_in_company(service):
    """Eight requests that differ in everything, alone one after the other and all at once."""
    kinds = [
        {"temperature": 0},
        {"temperature": 1, "seed": 1},
        {"temperature": 1, "seed": 2},
        {"temperature": 1.5, "top_p": 0.5, "seed": 3},
        {"temperature": 0, "repetition_penalty": 1.5},
        {"temperature": 0.7, "top_k": 5, "seed": -7, "frequency_penalty": 1},
        {"temperature": 1, "seed": 2**63 - 1, "presence_penalty": -1},
        {"temperature": 0, "logit_bias": {"65": 5}},
    ]
    asked = [
        (prompt, {"max_tokens": 16 + place, "ignore_eos": True, **kind})
        for place, (prompt, kind) in enumerate(zip(PROMPTS, kinds, strict=True))
    ]
    alone = [complete(service, prompt, **fields)["text"] for prompt, fields in asked]
    with ThreadPoolExecutor(8) as threads:
        for _ in range(3):
            together = list(threads.map(lambda one: complete(service, one[0], **one[1])["text"], asked))
            assert together == alone
        flows = list(threads.map(lambda one: streamed(service, one[0], **one[1])[0], asked))
    assert flows == alone
    same_prompt = {"max_tokens": 16, "ignore_eos": True, "temperature": 1}
    assert complete(service, "x", seed=1, **same_prompt) != complete(service, "x", seed=2, **same_prompt)


def test_f47_chats_are_the_same_in_company(service):
    ask = {"temperature": 0, "max_tokens": 12}
    alone = [service.chat(prompt, **ask).json()["choices"][0]["message"]["content"] for prompt in PROMPTS]
    with ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda prompt: service.chat(prompt, **ask).json(), PROMPTS))
    assert [reply["choices"][0]["message"]["content"] for reply in replies] == alone


def test_seeds_of_several_choices(service):
    fields = {"n": 3, "seed": 42, "temperature": 1, "max_tokens": 12, "ignore_eos": True}
    bodies = [service.http.post(TEXT, json={"prompt": "你好", **fields}).json() for _ in range(2)]
    texts = [[choice["text"] for choice in body["choices"]] for body in bodies]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    alone = complete(service, "你好", **{**fields, "n": 1})
    assert alone["text"] == texts[0][0]


def test_f33_short_requests_beside_a_huge_prompt(service):
    """They do not wait until it is read: they are answered before it has its first token."""
    context = service.http.get("/v1/models").json()["data"][0]["context_length"]
    body = {"prompt": [7] * (context - 40), "max_tokens": 2, "stream": True, "temperature": 0, "ignore_eos": True}
    with closing(Raw(service.port)) as huge, closing(Raw(service.port)) as short:
        huge.request("POST", TEXT, body)
        short.request("POST", TEXT, {"prompt": [8], "max_tokens": 3, "ignore_eos": True})
        assert short.response()[0] == 200
        huge.socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            huge.socket.recv(1)
        huge.socket.settimeout(30)
        assert b'"finish_reason":"length"' in huge.read_until(b"[DONE]")


def test_scores_as_lm_eval_reads_them(service, model):
    """lm-eval's `local-completions`: echo, logprobs and token ids; sums and greediness equal the model's own."""
    import torch

    network, tokenizer = model
    rows = [
        (tokenizer.encode("今天的天气"), tokenizer.encode("很好")),
        (tokenizer.encode("1 2 3"), tokenizer.encode(" 4")),
    ]
    prompts = [context + continuation for context, continuation in rows]
    body = {
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    choices = service.http.post(TEXT, json=body).json()["choices"]
    for (context, continuation), prompt, choice in zip(rows, prompts, choices, strict=True):
        scores = choice["logprobs"]
        span = slice(len(context), -1)
        total = sum(scores["token_logprobs"][span])
        pairs = zip(scores["tokens"][span], scores["top_logprobs"][span], strict=True)
        is_greedy = all(max(top, key=top.get) == token for token, top in pairs)
        with torch.no_grad():
            logprobs = network(torch.tensor([prompt])).logits.log_softmax(-1)[0]
        own = sum(logprobs[len(context) - 1 + place, token].item() for place, token in enumerate(continuation))
        best = logprobs[len(context) - 1 : len(prompt) - 1].argmax(-1).tolist() == continuation
        assert len(scores["tokens"]) == len(prompt) + 1
        assert total == pytest.approx(own, abs=1e-4) and is_greedy == best


@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_an_echo_without_an_answer(service, model, logprobs):
    prompts, ids = ["今天的天气", "1 2 3"], [model[1].encode(text) for text in ("今天的天气", "1 2 3")]
    for prompt in (prompts, ids):
        body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": logprobs}
        response = service.http.post(TEXT, json=body)
        assert response.status_code == 200, response.text
        choices = response.json()["choices"]
        assert [(c["text"], c["finish_reason"]) for c in choices] == [(text, "length") for text in prompts]
        assert [c["logprobs"] and len(c["logprobs"]["tokens"]) for c in choices] == (
            [None] * 2 if logprobs is None else list(map(len, ids))
        )
        assert response.json()["usage"]["completion_tokens"] == 0
    assert streamed(service, prompts[0], max_tokens=0, echo=True, logprobs=logprobs) == (prompts[0], "length")


def test_an_end_token_has_its_place_in_the_scores(service, model):
    """lm-eval drops the last place: without the end token there, the continuation's own last token would be lost."""
    _, tokenizer = model
    prompt = tokenizer.encode("今天的天气很好")
    fields = {"logprobs": 1, "echo": True, "max_tokens": 1, "temperature": 0}
    plain = complete(service, prompt, **fields)
    ended = complete(service, prompt, **fields, logit_bias={str(tokenizer.eos_token_id): 100})
    assert (ended["finish_reason"], ended["text"]) == ("stop", "今天的天气很好")
    scores = ended["logprobs"]
    assert scores["tokens"][-1] == tokenizer.eos_token and scores["text_offset"][-1] == len(ended["text"])
    assert scores["token_logprobs"][:-1] == plain["logprobs"]["token_logprobs"][:-1]
    assert all(len(column) == len(prompt) + 1 for column in scores.values())


def test_chat_logprobs_join_to_the_content(service):
    fields = {"logprobs": True, "top_logprobs": 3, "max_tokens": 24, "temperature": 1, "seed": 5}
    choice = service.chat("你好", **fields).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens) == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in tokens)
    for token in tokens:
        logprobs = [top["logprob"] for top in token["top_logprobs"]]
        assert logprobs == sorted(logprobs, reverse=True) and logprobs[0] >= token["logprob"] - 1e-6


def test_other_weights_have_another_fingerprint(service, tiny_qwen, tmp_path):
    from llm_code.module_interface.load import EngineSettings
    from llm_code.service.run import system_fingerprint
    from llm_code.service.server import weights_fingerprint

    def of(folder, **changes):
        return weights_fingerprint(EngineSettings(str(folder), served_model_name="final", **changes))

    shutil.copytree(tiny_qwen, tmp_path / "same")
    shutil.copytree(tiny_qwen, tmp_path / "retrained")
    weights = next((tmp_path / "retrained").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1000:] = bytes(1000)
    weights.write_bytes(content)
    known = of(tiny_qwen)
    assert of(tmp_path / "same") == known != of(tmp_path / "retrained")
    assert of(tiny_qwen, load_in_4bit=True) != known
    assert service.http.get("/v1/models").json()["data"][0]["weights_fingerprint"] == known
    engine = SimpleNamespace(model_name="tiny", weights_fingerprint=known)
    told = service.chat("你好", max_tokens=1).json()["system_fingerprint"]
    assert (
        told
        == system_fingerprint(engine)
        != system_fingerprint(SimpleNamespace(model_name="tiny", weights_fingerprint=None))
    )
