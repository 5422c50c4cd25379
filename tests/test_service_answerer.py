"""Questions put to a service: what it is asked for, and what becomes of refusals."""

import time
from threading import Event

import pytest

from finetune.errors import UserError
from llm_code.llm_evaluation.answering import Decoding, Prompt
from llm_code.llm_evaluation.service_answerer import Service
from tests.chat_server import ScriptedServer


def answers_of(service, texts):
    """{number: answer} until the error, and the error."""
    prompts, answers = [Prompt(text) for text in texts], {}
    try:
        for pairs in service.answer(prompts, service.plan(prompts)):
            answers |= dict(pairs)
    except UserError as error:
        return answers, error
    return answers, None


def test_a_service_is_asked_without_the_checkpoints_penalty_and_limit():
    with ScriptedServer(lambda body: (200, "A")) as server:
        service = Service(server.url, Decoding(4))
        assert answers_of(service, ["问"]) == ({0: "A"}, None)
        [body] = server.requests
        assert body["repetition_penalty"] == 1 and body["top_k"] == -1
        assert service.identity([])["repetition_penalty"] == 1


def test_a_server_of_the_plain_protocol_is_asked_in_it(capsys):
    def reply(body):
        return (400, "Unrecognized request argument supplied: top_k") if "top_k" in body else (200, "A")

    with ScriptedServer(reply) as server:
        assert answers_of(Service(server.url, Decoding(4), concurrency=1), ["一", "二"]) == ({0: "A", 1: "A"}, None)
        assert ["top_k" in body for body in server.requests] == [True, False, False]
    assert "refuses repetition_penalty, top_k" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["context_length_exceeded", "This model's maximum context length is 256 tokens."])
def test_a_question_that_does_not_fit_is_named_when_the_others_are_answered(words):
    def reply(body):
        return (400, words) if len(body["messages"][0]["content"]) > 9 else (200, "A")

    with ScriptedServer(reply) as server:
        answers, error = answers_of(Service(server.url, Decoding(4)), ["一", "长" * 99, "二", "三"])
        assert answers == {0: "A", 2: "A", 3: "A"} and len(server.requests) == 4
    assert "1 of 4 questions do not fit the service's context, first question 2, '长长" in str(error)


def test_a_refusal_keeps_what_is_on_its_way_and_a_vain_retry_is_left_out():
    refused = Event()

    def reply(body):
        if body["messages"][0]["content"] == "坏问题":
            refused.set()
            return 504, "not finished within 600 seconds"
        return (200, "A") if refused.wait(10) and not time.sleep(0.3) else (500, "never")

    with ScriptedServer(reply) as server:
        answers, error = answers_of(Service(server.url, Decoding(4), concurrency=3), ["坏问题", "一", "二", "三", "四"])
        assert {1: "A", 2: "A"}.items() <= answers.items() and "HTTP 504" in str(error)
        assert sum(body["messages"][0]["content"] == "坏问题" for body in server.requests) == 1
