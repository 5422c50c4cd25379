"""The service: an OpenAI-compatible HTTP interface (and the walkthrough's /internal/ask) over the engine."""
