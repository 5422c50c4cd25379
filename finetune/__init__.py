"""What both projects share: checkpoints, chat encoding, batching, QLoRA, training, generation."""
