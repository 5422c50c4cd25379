"""The bundled text-matching task: word lists, sentence frames, pairs and prompts, all generated with a fixed seed."""
