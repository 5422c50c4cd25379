"""Legacy checkpoints (Qwen-1, Baichuan2-7B) rewritten once as what transformers, peft and vLLM load natively.

    python -m finetune.checkpoint SOURCE TARGET [--keep_original 0|1]

layouts.py knows a folder by its config; qwen1.py and baichuan2.py say which tensor becomes which; source.py reads
shards without loading them; manifest.py is the plan that survives a kill; convert.py carries it out; verify.py checks
the result before `conversion.json`, the marker, is written.
"""
