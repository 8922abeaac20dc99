"""Chat templates that a config can choose by name."""

from __future__ import annotations

from typing import NamedTuple


class BuiltIn(NamedTuple):
    """Jinja text, and the special tokens that it writes."""

    text: str
    specials: tuple[str, ...]


# Content is text, or a list of parts of which those of text are written.
_CONTENT = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content or [] -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""

# ChatML, with functions as Hermes and Qwen are told of them.
_CHATML = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- set first = messages[0] -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first['role'] == 'system' -%}{{- text(first['content']) + '\\n\\n' -}}{%- endif -%}
{{- 'You may call functions. Their signatures:\\n<tools>' -}}
{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools>\\nTo call one, write:\\n<tool_call>\\n' -}}
{{- '{"name": <name>, "arguments": <object>}\\n</tool_call><|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message['role'] == 'system') -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{{- text(message['content']) -}}
{%- for call in message['tool_calls'] or [] -%}
{%- set f = call['function'] or call -%}
{{- '\\n' if message['content'] or not loop.first -}}
{{- '<tool_call>\\n{"name": ' + (f['name'] | tojson) + ', "arguments": ' -}}
{{- f['arguments'] if f['arguments'] is string else (f['arguments'] | tojson) -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
)

_LLAMA3 = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' -}}
{{- (text(message['content']) | trim) + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""
)

# Gemma knows no system: what it says opens the first user's turn.
_GEMMA = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- set system = messages[0]['role'] == 'system' -%}
{%- for message in messages[(1 if system else 0):] -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + role + '\\n' -}}
{%- if system and loop.first -%}{{- text(messages[0]['content']) + '\\n\\n' -}}{%- endif -%}
{{- (text(message['content']) | trim) + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""
)

# No roles and no markers: a reply is what follows a text, up to end-of-text.
_PLAIN = (
    _CONTENT
    + """\
{{- bos_token -}}
{%- for message in messages -%}
{{- text(message['content']) -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
"""
)

BUILT_IN = {
    "chatml": BuiltIn(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": BuiltIn(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "gemma": BuiltIn(_GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "plain": BuiltIn(_PLAIN, ()),
}
