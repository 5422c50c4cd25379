"""The service's README says what is true."""

import re

from llm_code.service.metrics import Metrics
from llm_code.service.middleware import PATHS
from llm_code.service.protocol import ChatCompletionRequest
from llm_code.service.routes import ROUTES
from llm_code.service.settings import ServiceSettings
from tests.conftest import REPOSITORY

README = (REPOSITORY / "llm_code" / "service" / "README.md").read_text(encoding="utf-8")


def test_limits_are_the_defaults():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| (\d+) \|$", README, re.MULTILINE)
    assert len(rows) >= 7
    for name, value in rows:
        assert getattr(ServiceSettings(), name) == int(value), name


def test_addresses_are_the_routes():
    named = set(re.findall(r"(?:GET|POST) (/[\w/{}.]+)`", README))
    assert named == {route.path.replace(":path", "") for route in ROUTES}
    assert {path.replace("{name}", "") for path in named} >= set(PATHS) and len(PATHS) == len(ROUTES) - 1


def test_fields_are_fields():
    row = next(line for line in README.splitlines() if "`POST /v1/chat/completions`" in line)
    fields = [field.strip() for field in row.split("|")[2].replace("penalties", "frequency_penalty").split(",")]
    assert len(fields) == 10 and set(fields) <= set(ChatCompletionRequest.model_fields)


def test_metrics_without_an_engine():
    text = Metrics().render(None, "loading")
    assert "llm_ready 0\n" in text and "llm_engine" not in text
    assert 'llm_first_token_seconds_bucket{le="+Inf"} 0\n' in text
