"""The engine: messages in, text or a stream of events out. Types in interface.py, two engines behind load_engine."""
