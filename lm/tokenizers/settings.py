"""What the small files beside a vocabulary say: which tokens are special, and how it is used."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.config import ConfigError, check
from lm.files import parse_object, read_bytes
from lm.tokenizers.base import MASKS, SENTINEL
from lm.tokenizers.config import END_OF_TEXT

# What Hugging Face keeps beside tokenizer.json: the roles of specials, and chat templates.
TEMPLATE_FILE = "chat_template.jinja"
HUGGING_FACE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    TEMPLATE_FILE,
    "chat_template.json",
)
_READ = (*HUGGING_FACE_FILES, "added_tokens.json", "config.json")

# Roles as tokenizer_config.json names them, then the usual names where it is silent.
_ROLES = {
    "eos": ("eos_token", "sep_token"),
    "bos": ("bos_token", "cls_token"),
    "pad": ("pad_token",),
    "unk": ("unk_token",),
    "mask": ("mask_token",),
}
USUAL_NAMES = {
    "eos": (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "[SEP]"),
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[CLS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|padding|>"),
    "unk": ("<unk>", "[UNK]", "<|unknown|>"),
    "mask": MASKS,
}

# The tokenizer's class where no file names it, by `model_type`.
_CLASSES = {
    **dict.fromkeys(("gpt2", "opt"), "GPT2"),
    **dict.fromkeys(("qwen2", "qwen3"), "Qwen2"),
    **dict.fromkeys(("llama", "mistral", "mixtral"), "Llama"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text"), "Gemma"),
    **dict.fromkeys(("t5", "mt5", "umt5"), "T5"),
    **{"bart": "Bart", "bert": "Bert", "gpt_neox": "GPTNeoX", "roberta": "Roberta"},
    **{"marian": "Marian", "mbart": "MBart"},
}
_T5_SENTINELS = 100  # what a T5 tokenizer adds where no file says how many


def template_of_file(data: bytes, name: str) -> str:
    """The Jinja text in a file of that name; raises ConfigError where it is none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{name!r} is not UTF-8 text") from None


def template_files(templates: Mapping[str, str]) -> dict[str, bytes]:
    """Files that hold `Settings.templates`: one of its own for the usual one, if it is the only."""
    if templates.keys() <= {"default"}:
        return {TEMPLATE_FILE: templates["default"].encode()} if templates else {}
    named = [{"name": name, "template": text} for name, text in templates.items()]
    text = json.dumps({"chat_template": named}, indent=2, ensure_ascii=False) + "\n"
    return {"tokenizer_config.json": text.encode()}


class Settings:
    """The files, by name; their objects are parsed when asked for.

    Raises:
      ConfigError: by whatever reads a file that is damaged.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None):
        self.files = dict(files or {})

    @classmethod
    def beside(cls, file: Path) -> Settings:
        """Those in the same directory as a vocabulary."""
        found = {name: file.parent / name for name in _READ}
        return cls({name: read_bytes(path) for name, path in found.items() if path.is_file()})

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The object in a file; {} where there is none."""
        return parse_object(self.files[name], name) if name in self.files else {}

    @property
    def own(self) -> dict[str, Any]:
        """`tokenizer_config.json`."""
        return self["tokenizer_config.json"]

    @property
    def kept(self) -> dict[str, bytes]:
        """The files that stay with a tokenizer.json."""
        return {name: data for name, data in self.files.items() if name in HUGGING_FACE_FILES}

    @property
    def templates(self) -> dict[str, str]:
        """Chat templates by name, as Jinja text; the usual one is "default".

        Raises:
          ConfigError: a template that is no text.
        """
        found: dict[str, str] = {}
        for name in ("chat_template.json", "tokenizer_config.json"):
            value = self[name].get("chat_template") or {}
            if isinstance(value, str):
                value = {"default": value}
            if isinstance(value, list):
                named = all(isinstance(one, dict) and "name" in one for one in value)
                check(named, f"{name}: chat_template must be a text, or a list of named ones")
                value = {str(one["name"]): one.get("template") for one in value}
            texts = isinstance(value, dict) and all(isinstance(t, str) for t in value.values())
            check(texts, f"{name}: chat_template must be a text, or a list of named ones")
            found |= value
        if TEMPLATE_FILE in self.files:
            found["default"] = template_of_file(self.files[TEMPLATE_FILE], TEMPLATE_FILE)
        return found

    @property
    def tokens(self) -> dict[str, str]:
        """Field, such as `cls_token` → a special's name, "" for none.

        special_tokens_map.json has the last word, unless tokenizer_config.json lists the added
        tokens itself: then transformers does not look at it.
        """
        config, mapped = self.own, self["special_tokens_map.json"]
        listed = "added_tokens_decoder" in config
        settings = {**mapped, **config} if listed else {**config, **mapped}
        return {
            key: str((token.get("content") if isinstance(token, dict) else token) or "")
            for key, token in settings.items()
            if key.endswith("_token")
        }

    @property
    def roles(self) -> dict[str, str]:
        """The names of specials by role, of those that have one."""
        tokens = self.tokens
        named = {
            role: next((tokens[key] for key in keys if tokens.get(key)), "")
            for role, keys in _ROLES.items()
        }
        return {role: name for role, name in named.items() if name}

    def around(self, first: str, last: str) -> tuple[str, str]:
        """The names of what stands before and after a text; where the files are silent, these."""
        return self.tokens.get("cls_token") or first, self.tokens.get("sep_token") or last

    @property
    def kind(self) -> str:
        """The class that opens these files in transformers, less `Tokenizer` and `Fast`."""
        model = self["config.json"]
        named = self.own.get("tokenizer_class") or model.get("tokenizer_class")
        named = named or _CLASSES.get(str(model.get("model_type")), "")
        return str(named).removesuffix("Fast").removesuffix("Tokenizer")

    @property
    def end(self) -> int | None:
        """The id at which the model beside the tokenizer ends a text, if its config.json tells."""
        ids = self["config.json"].get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        return first if isinstance(first, int) and 0 <= first < 1 << 31 else None

    @property
    def begins_and_ends(self) -> tuple[bool, bool]:
        """Whether begin- and end-of-text stand around the ids of a SentencePiece model.

        Raises:
          ConfigError: a setting that such a model cannot follow.
        """
        config, kind = self.own, self.kind
        check(
            config.get("add_prefix_space") is not False or kind != "Llama",
            "tokenizer_config.json: add_prefix_space=False is not supported of a SentencePiece "
            "model: save a tokenizer.json with transformers, AutoTokenizer.from_pretrained(DIR)",
        )
        begins = config.get("add_bos_token", kind in ("Llama", "Gemma"))
        ends = kind in ("T5", "MT5", "Marian", "MBart", "MBart50")
        return bool(begins), bool(config.get("add_eos_token", ends))

    def added_tokens(self, size: int = 0) -> dict[str, int]:
        """Tokens added to a vocabulary, name → id.

        `size` is that of a SentencePiece vocabulary, after which T5's sentinels come, the last one
        first.
        """
        config = self.own
        found = {str(name): int(id) for name, id in self["added_tokens.json"].items()}
        for id, token in (config.get("added_tokens_decoder") or {}).items():
            found[str(token["content"])] = int(id)
        if size and SENTINEL.format(0) not in found:
            kind = str(config.get("tokenizer_class", ""))
            model = str(self["config.json"].get("model_type", ""))
            is_t5 = kind.startswith(("T5", "MT5")) or _CLASSES.get(model) == "T5"
            count = config.get("extra_ids", _T5_SENTINELS if is_t5 else 0)
            found |= {SENTINEL.format(i): size + count - 1 - i for i in range(count)}
        return found
