"""Chat templates of the two families, as the published prompt builders write them.

Qwen: make_context of qwen_generation_utils.py; a conversation without a system message gets the default one. Baichuan2:
build_chat_input of generation_utils.py; a system text is a bare prefix, nothing stands between turns, </s> closes a
conversation that ends with an answer. {% generation %} marks what is supervised where a template can say it. A template
cannot keep control tokens inside a message from being read as such; finetune.conversation does.
"""

QWEN_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}
{%- generation -%}{{- message['content'] + '<|im_end|>\\n' -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' or (message['role'] == 'system' and loop.first) -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- else -%}
{{- raise_exception('expected role user, assistant or a leading system, got ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

BAICHUAN2_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<reserved_107>' -}}
{%- generation -%}{{- message['content'] + ('</s>' if loop.last else '') -}}{%- endgeneration -%}
{%- elif message['role'] == 'user' -%}
{{- '<reserved_106>' + message['content'] -}}
{%- elif message['role'] == 'system' and loop.first -%}
{{- message['content'] -}}
{%- else -%}
{{- raise_exception('expected role user, assistant or a leading system, got ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<reserved_107>' -}}{%- endif -%}
"""
