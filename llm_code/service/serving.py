"""What the service does, without HTTP: requests in, runs and replies out."""

import time
from concurrent.futures import ThreadPoolExecutor

from llm_code.module_interface.interface import Engine
from llm_code.service.admission import Admission
from llm_code.service.answers import Answers
from llm_code.service.chat_run import ChatRun
from llm_code.service.completion_run import CompletionRun
from llm_code.service.errors import ApiError
from llm_code.service.metrics import Metrics
from llm_code.service.protocol import AskRequest, ChatCompletionRequest, CompletionRequest, Sampling
from llm_code.service.replies import AskReply, ModelCard, ModelList
from llm_code.service.run import Run
from llm_code.service.sampling import sampling_params
from llm_code.service.settings import ServiceSettings


class Serving:
    """One engine's service."""

    def __init__(self, engine: Engine, settings: ServiceSettings, metrics: Metrics) -> None:
        self.engine, self.settings, self.metrics = engine, settings, metrics
        self.created = int(time.time())
        limits = engine.limits
        per_key = settings.max_requests_per_key
        if not per_key and len(settings.api_keys) > 1:
            per_key = max(1, limits.max_batch // 2)
        self.admission = Admission(limits.max_batch + limits.max_queue, per_key, metrics)
        self.open_answers: set[Answers] = set()
        self.encoder = ThreadPoolExecutor(1, "encode")  # tokenizers have settings that a second thread would change

    def chat(self, request: ChatCompletionRequest, key: str) -> ChatRun:
        """A chat completion, not started. Raises ApiError for an unknown model or what this engine cannot do."""
        return self._run(ChatRun, request, key)

    def completion(self, request: CompletionRequest, key: str) -> CompletionRun:
        return self._run(CompletionRun, request, key)

    async def ask(self, request: AskRequest, key: str) -> AskReply:
        """The walkthrough's question: one turn, sampled as the model recommends."""
        chat = ChatCompletionRequest(messages=[{"role": "user", "content": request.query}])
        reply = await self.chat(chat, key).reply()
        return AskReply(llm_result=reply.choices[0].message.content)

    def models(self) -> ModelList:
        return ModelList(object="list", data=[self.model(name) for name in self._names()])

    def model(self, name: str | None) -> ModelCard:
        """The card of a served name. Raises ApiError 404."""
        context, weights = self.engine.limits.context, self.engine.weights_fingerprint
        known = {"weights_fingerprint": weights} if weights else {}
        return ModelCard(
            id=self._served_name(name),
            object="model",
            created=self.created,
            owned_by="llm_code",
            root=self.engine.model_name,
            context_length=context,
            max_model_len=context,
            **known,
        )

    def _run(self, kind: type[Run], request: Sampling, key: str) -> Run:
        model = self._served_name(request.model)
        params = sampling_params(request, self.engine.defaults, self.engine.limits)
        return kind(self, request, params, model, key)

    def fail(self, error: ApiError) -> None:
        """End every answer that is being read; an engine that is lost sends no events any more."""
        for answers in self.open_answers:
            answers.fail(error)

    def close(self) -> None:
        """End what still runs and free everything."""
        self.encoder.shutdown(wait=False, cancel_futures=True)
        self.engine.close()

    def _names(self) -> tuple[str, ...]:
        return (self.engine.model_name, *self.settings.model_aliases)

    def _served_name(self, name: str | None) -> str:
        names = self._names()
        if name is None or (self.settings.any_model and name not in names):
            return names[0]
        if name in names:
            return name
        message = f"the model {name[:100]!r} is not served here; there is: {', '.join(names)}"
        raise ApiError(404, message, param="model", code="model_not_found")
