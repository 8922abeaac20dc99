"""A run, opened: what its directory holds, ready to be asked. Or a Hugging Face directory."""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import numpy as np

from lm.config import ConfigError, check, check_choice, view
from lm.inference import (
    Candidate,
    Framing,
    Generator,
    SamplingConfig,
    SearchConfig,
    fill,
    fill_spans,
    score,
    search,
)
from lm.inference.prepare import CacheKind, Weights
from lm.models import Model, bind, skeleton
from lm.models.activations import Edit, check_fields, tracer
from lm.models.config import DTYPES
from lm.runs.directory import CONFIG
from lm.runs.reward import Prompt, Scale, pairs_of, reply_ids
from lm.runs.sources import open_source
from lm.runs.vectors import Vectors, read_vectors
from lm.tokenizers import ChatTemplate, Tokenizer, chat_template
from lm.training.metrics import read_metrics

AT_ONCE = 128  # prompts replied to together


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A trained model with all that belongs to it; `lm.load` makes one."""

    directory: pathlib.Path
    config: dict[str, Any]  # config.json
    tokenizer: Tokenizer | None  # None for a Hugging Face model that came without one
    skeleton: Model  # without its parameters: what `lm.models.bind` and `param_specs` take
    params: dict[str, jax.Array]  # dotted name → array, float32
    step: int  # of the checkpoint

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        step: int | str | None = None,
        ignore: str | Sequence[str] = (),
        base: str | os.PathLike[str] | None = None,
        compute_dtype: str | None = None,
    ) -> Run:
        """See `lm.load`."""
        source = open_source(directory, ignore, base)
        check_choice("compute_dtype", compute_dtype, (None, *DTYPES))
        dtype = compute_dtype or source.model.compute_dtype
        model = skeleton(dataclasses.replace(source.model, compute_dtype=dtype))
        step, params = source.parameters(step)
        return cls(source.directory, source.config, source.tokenizer, model, params, step)

    def model(self, tokens_BT: Any, targets_BT: Any = None, **arguments: Any) -> jax.Array:
        """Logits [B, T, V], float32, of the token after each position, or at it (encoder).

        Compiled for each shape; with a `tap` it runs operation by operation, so that the tap may
        keep what it sees.

        Args:
          tokens_BT: token ids, as an array or lists of equal length; see `encode`. An
            encoder-decoder's source.
          targets_BT: what its decoder reads, from its start token on.
          **arguments: as of `lm.models.Transformer.__call__`.

        Raises:
          ConfigError: rows of unequal length, too long, or with ids the model does not have.
        """
        check(
            self.skeleton.config.has_output_head,
            "a reward model has no logits: ask it for rewards (Run.score)"
            if self.skeleton.config.output_head
            else "a model with output_head=False has no logits: ask it for vectors (Run.embed)",
        )
        both = self.skeleton.config.architecture == "encoder_decoder"
        check(
            both == (targets_BT is not None),
            f"a model with architecture={self.skeleton.config.architecture!r} reads "
            + ("two texts: source_BS and targets_BT" if both else "one text, and no targets_BT"),
        )
        tokens = [self._checked(x) for x in (tokens_BT, targets_BT) if x is not None]
        if "tap" in arguments:
            return self.transformer(*tokens, **arguments)
        return self._forward(self.params, *tokens, **arguments)

    def trace(
        self,
        tokens_BT: Any,
        names: str | Sequence[str],
        targets_BT: Any = None,
        *,
        edits: Mapping[str, Edit] | None = None,
        **fields: Any,
    ) -> dict[str, jax.Array]:
        """The named activations of a text: attention patterns, residual streams, and the like.

            run.trace("The cat sat on the mat.", "blocks.*.attention.pattern")

        Compiled for each shape and set of names; nothing else is kept. `lm.models.activations` says
        which names there are, with their axes, and has the same as a function that can be
        differentiated.

        Args:
          tokens_BT: token ids, as of `model`; rows of different lengths are padded on the right.
            Or a text, or several.
          names: one or several; `*` stands for anything.
          targets_BT: what an encoder-decoder's decoder reads.
          edits: name → what to use instead: an array, or a function of the activation, which is
            compiled for this call (so give arrays where there are many calls).
          **fields: of a text (`lm.models.text.Text`), such as `segments_BT`, 0 at padding.

        Returns:
          Name → value, in the order they are computed.

        Raises:
          ConfigError: a name the model does not have, an edit of another shape, or no such tokens.
        """
        check_fields(fields)
        names = (names,) if isinstance(names, str) else tuple(names)
        several = [tokens_BT] if targets_BT is None else [tokens_BT, targets_BT]
        segments = ("source_segments_BS", "segments_BT")[-len(several) :]
        texts = []
        for field, rows in zip(segments, map(self._rows, several)):
            if len({np.size(row) for row in rows}) > 1:
                check(fields.get(field) is None, f"{field} is given of rows of different lengths")
                fields[field] = _padded([np.ones(len(row), np.int32) for row in rows])
                rows = _padded(rows)
            texts.append(self._checked(rows))
        values = {name: edit for name, edit in (edits or {}).items() if not callable(edit)}
        functions = {name: edit for name, edit in (edits or {}).items() if callable(edit)}
        traced = tracer(self.skeleton, functions) if functions else self._tracer
        return dict(traced(self.params, texts, values, fields, names=names))

    def intervene(
        self, tokens_BT: Any, edits: Mapping[str, Edit], targets_BT: Any = None, **fields: Any
    ) -> jax.Array:
        """Logits [B, T, V] with activations replaced; arguments as of `trace`.

        run.intervene(tokens_BT, {"blocks.1.attention.heads": lambda x: x.at[:, :, 3].set(0)})
        """
        return self.trace(tokens_BT, "logits", targets_BT, edits=edits, **fields)["logits"]

    def encode(self, text: str) -> list[int]:
        """The tokens the model reads for `text`: those around it too (`lm.inference.Framing`)."""
        return self.framing.encode(self.tokenizer, text)

    def generate(
        self,
        prompt: str | Sequence[str] = "",
        *,
        seed: int = 0,
        draft: Run | str | os.PathLike[str] | None = None,
        json_schema: str | dict | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        weights: Weights = "compute",
        cache: CacheKind = "compute",
        source_language: str = "",
        target_language: str = "",
        **settings: Any,
    ) -> str | list[str]:
        """The prompt followed by its continuation, up to end-of-text or `max_new_tokens`.

        The prompt is returned as it was given; the rest is what the tokens decode to. Of an
        encoder-decoder the prompt is the source, and the target alone is returned: a translation.
        The same arguments give the same text. Past a decoder's context its window slides (see
        `lm.inference.engine`); an encoder-decoder's target ends there.

        Args:
          prompt: one text or several, which are continued together.
          seed: of the random draws.
          draft: a smaller model of the same tokenizer, or its directory: it guesses tokens, and the
            text comes sooner, from the same distribution (`lm.inference.speculation`).
          json_schema, regex, grammar: at most one that every continuation keeps to: a JSON schema,
            a regular expression, or a grammar in Lark's notation; see `lm.inference.grammar`.
          weights: `int8` reads matrices rounded to eight bits, a quarter of float32's memory.
          cache: `int8` rounds keys and values so; not of a search, whose cache is its own.
          source_language, target_language: of a translator, if not those it has; see `between`.
          **settings: fields of `lm.inference.SearchConfig`: `max_new_tokens`, `temperature`,
            `top_p`, `repetition_penalty`, `num_samples`, `num_beams`, `prompt_lookup`, …

        Returns:
          A string; for several prompts or samples a list, the samples of a prompt side by side.

        Raises:
          ConfigError: a prompt that is no text or too long, a setting out of range, or an encoder,
            which cannot generate.
        """
        if source_language or target_language:
            other = self.between(source_language, target_language)
            named = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
            named |= {"draft": draft, "weights": weights, "cache": cache}
            return other.generate(prompt, seed=seed, **named, **settings)
        plain = {k: v.item() if isinstance(v, np.generic) else v for k, v in settings.items()}
        if draft is not None:
            plain["draft"] = os.fspath(draft.directory if isinstance(draft, Run) else draft)
        config = view(SearchConfig, plain, "generate")
        check(
            isinstance(prompt, Sequence) and not isinstance(prompt, bytes),
            f"prompt={prompt!r} must be text, or a list of texts",
        )
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            return []
        read = [self.encode(text) for text in prompts]
        if draft is not None and not isinstance(draft, Run):
            draft = Run.load(draft)
        generator = self.writer(weights, cache)
        kept = generator.grammar(json=json_schema, regex=regex, lark=grammar)
        generation = search(generator, read, config, seed, draft and draft.generator, kept)
        check(
            config.logprobs is None and config.prompt_logprobs is None,
            "logprobs and prompt_logprobs are not part of a text: iterate over "
            "Run.generator.generate, whose `steps` and `prompt_steps` have them",
        )
        samples = range(config.num_samples)
        texts = [generator.opening(text) for text in prompts for _ in samples]
        for row, text in generation.texts():
            texts[row] += text
        for notice in generation.notices:
            warnings.warn(notice, stacklevel=2)
        return texts[0] if isinstance(prompt, str) and len(texts) == 1 else texts

    def embed(self, texts: str | Sequence[str], pooling: str = "") -> np.ndarray:
        """A vector for each text, float32 [N, D], or [D] for a single one.

        Args:
          texts: one or several; a text's vector does not depend on the others.
          pooling: as of `lm.inference.embed`; "": as the directory tells sentence-transformers.

        Raises:
          ConfigError: a text too long, a pooling or module that is not there, or not known.
        """
        ids = [self.encode(text) for text in ([texts] if isinstance(texts, str) else texts)]
        own = Vectors(pooling) if pooling else self.vectors
        vectors_ND = own.of(self.skeleton.config, self.params, ids)
        return vectors_ND[0] if isinstance(texts, str) else vectors_ND

    def score(
        self,
        prompts: Prompt | Sequence[Prompt],
        responses: str | Sequence[str],
        finished: Sequence[bool] | None = None,
        *,
        normalized: bool = True,
        chat_template: str = "",
        length: int = 0,
    ) -> np.ndarray:
        """A reward model's reward of each response, float32 [N].

            run.score("Where did the cat sit?", ["On the mat.", "I do not care."])

        A reward is read from the response's last token, its end-of-turn; it does not depend on the
        other responses.

        Args:
          prompts: what a user says, or messages; one for all responses, or one for each.
          responses: one or several replies.
          finished: whether each ended by itself; of one that did not, the last token is its own.
          normalized: rewards on the scale of the run's held-out replies (`lm.runs.reward.Scale`).
          chat_template: as of the method `chat_template`.
          length: tokens to which shorter conversations are padded, for one program to serve all.

        Raises:
          ConfigError: a model that is no reward model, no chat template, or a conversation longer
            than the model's context.
        """
        config = self.skeleton.config
        check(
            (config.architecture, config.classifier, config.num_labels)
            == ("decoder", "sequence", 1),
            f"config.model.architecture={config.architecture!r} with classifier="
            f"{config.classifier!r} and num_labels={config.num_labels} is no reward model: that "
            "has 'decoder', 'sequence' and 1",
        )
        prompts, responses = pairs_of(prompts, responses)
        finished = [True] * len(responses) if finished is None else finished
        template = self.chat_template(chat_template, "chat_template")
        texts = [reply_ids(template, *each) for each in zip(prompts, responses, finished)]
        reward_N = score(config, self.params, texts, length)[:, 0]
        return self._scale(reward_N) if normalized else reward_N

    def reply(
        self,
        prompts: Prompt | Sequence[Prompt],
        tools: Sequence[Sequence[Any] | None] | None = None,
        *,
        seed: int = 0,
        chat_template: str = "",
        **settings: Any,
    ) -> str | list[str]:
        """What the model replies to a user, or to several, up to the end of its turn.

            run.reply("Where did the cat sit?", temperature=0)

        Past a decoder's context the oldest tokens are left out.

        Args:
          prompts: what a user says, or messages; one, or several that are replied to together.
          tools: for each prompt the JSON schemas of functions that may be called, or None.
          seed: of the random draws.
          chat_template: as of the method `chat_template`.
          **settings: fields of `lm.inference.SamplingConfig`.

        Raises:
          ConfigError: no chat template, messages that it cannot write, or a model that does not
            write.
        """
        one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], Mapping))
        several = [prompts] if one else list(prompts)
        sampling = view(SamplingConfig, settings, "sampling")
        check(sampling.num_samples == 1, "num_samples must be 1: give the prompt several times")
        template = self.chat_template(chat_template, "chat_template")
        if sampling.stop_at_end_of_text:
            sampling = sampling.ending(*template.ends)
        said = [p if not isinstance(p, str) else [{"role": "user", "content": p}] for p in several]
        read = [template.encode(*pair) for pair in zip(said, tools or [None] * len(said))]
        replies = [""] * len(read)
        order = sorted(range(len(read)), key=lambda i: len(read[i]))  # alike in length together
        for first in range(0, len(order), AT_ONCE):
            part = order[first : first + AT_ONCE]
            generation = self.generator.generate([read[i] for i in part], sampling, seed)
            for row, text in generation.texts():
                replies[part[row]] += text
        return replies[0] if one else replies

    def fill(self, text: str, top_k: int = 5) -> list[list[Candidate]]:
        """The likeliest tokens in place of each mask in `text`; for an encoder.

            for token, probability, _ in run.fill("The cat [MASK] on the mat.")[0]:
                print(f"{probability:.2f}{token}")

        Args:
          text: with the mask token's name where a token is to be guessed.
          top_k: how many candidates for each mask.

        Raises:
          ConfigError: a model that is not an encoder, or a text without a mask, or too long.
        """
        config = self.skeleton.config
        return fill(config, self.params, self.tokenizer, self.framing, text, top_k)

    def fill_spans(self, text: str, max_new_tokens: int = 100) -> list[str]:
        """What stands behind each sentinel in `text`; for an encoder-decoder trained as T5 was.

            run.fill_spans("The cat <extra_id_0> on the <extra_id_1>.")

        Args:
          text: with sentinels, numbered from 0, where something is to be filled in.
          max_new_tokens: of all stretches together.

        Raises:
          ConfigError: another kind of model, or a text without sentinels, or too long.
        """
        return fill_spans(self.generator, text, max_new_tokens)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The records of `metrics.jsonl`, as they are now."""
        return read_metrics(self.directory)

    @functools.cached_property
    def vectors(self) -> Vectors:
        """How its directory makes vectors of texts."""
        return read_vectors(self.directory)

    @functools.cached_property
    def transformer(self) -> Model:
        """The model with its parameters bound, for all that `model` does not do."""
        return bind(self.skeleton, self.params)

    @functools.cached_property
    def framing(self) -> Framing:
        """The special tokens around a text: as the config's section `framing` says, or as usual."""
        check(
            self.tokenizer is not None,
            f"{self.directory} has no tokenizer: its model reads ids (Run.model), and no text",
        )
        where = f"{self.directory / CONFIG}: framing"
        return Framing.of_run(self.config, self.skeleton.config, self.tokenizer, where)

    def between(self, source: str = "", target: str = "") -> Run:
        """The same model, translating from and to these languages; "": from or to its own.

            run.between("en_XX", "ro_RO").generate("There is no military solution.")

        Raises:
          ConfigError: a language that its tokenizer has no token of; see `Framing.between`.
        """
        if not source and not target:
            return self
        if (source, target) not in self._between:
            framing = self.framing.between(self.tokenizer, source, target)
            config = {**self.config, "framing": dataclasses.asdict(framing)}
            self._between[source, target] = dataclasses.replace(self, config=config)
        return self._between[source, target]

    @functools.cached_property
    def _between(self) -> dict[tuple[str, str], Run]:
        return {}

    def chat_template(self, chosen: str = "", field: str = "config.chat_template") -> ChatTemplate:
        """How the model's conversations are written; see `lm.tokenizers.chat_template`."""
        return chat_template(self.tokenizer, chosen, self.framing.before or (), field)

    @functools.cached_property
    def generator(self) -> Generator:
        """The model as a writer, of ids or of text; `generate` returns what it streams."""
        return Generator(self.skeleton, self.params, self.framing, self.tokenizer)

    def writer(self, weights: Weights, cache: CacheKind = "compute") -> Generator:
        """`generator`, or one whose matrices, keys and values are as asked for."""
        check_choice("weights", weights, get_args(Weights))
        check_choice("cache", cache, get_args(CacheKind))
        if weights == cache == "compute":
            return self.generator
        if (weights, cache) not in self._writers:
            parts = self.skeleton, self.params, self.framing, self.tokenizer
            self._writers[weights, cache] = Generator(*parts, weights, cache=cache)
        return self._writers[weights, cache]

    @functools.cached_property
    def _scale(self) -> Scale:
        return Scale.read(self.directory)

    @functools.cached_property
    def _writers(self) -> dict[tuple[Weights, CacheKind], Generator]:
        return {}

    @functools.cached_property
    def _forward(self):
        skeleton = self.skeleton
        return jax.jit(lambda params, *tokens, **a: bind(skeleton, params)(*tokens, **a))

    @functools.cached_property
    def _tracer(self):
        return tracer(self.skeleton, {})

    def _rows(self, tokens: Any) -> Any:
        """Rows of token ids, of these or of a text or several."""
        if isinstance(tokens, str):
            return [self.encode(tokens)]
        if isinstance(tokens, list | tuple) and tokens and isinstance(tokens[0], str):
            return [self.encode(text) for text in tokens]
        return tokens

    def _checked(self, tokens_BT: Any) -> np.ndarray:
        config = self.skeleton.config
        try:
            tokens_BT = np.asarray(tokens_BT)
        except ValueError:
            raise ConfigError("tokens_BT has rows of different lengths: pad them") from None
        check(
            tokens_BT.ndim == 2 and np.issubdtype(tokens_BT.dtype, np.integer),
            f"tokens_BT of shape {tokens_BT.shape} and type {tokens_BT.dtype} must be rows of "
            "token ids, such as [run.encode(text)]",
        )
        check(
            tokens_BT.shape[1] <= config.max_length,
            f"tokens_BT has {tokens_BT.shape[1]} tokens a row, but the model's context is "
            f"{config.max_length}",
        )
        check(
            tokens_BT.size == 0 or (tokens_BT.min() >= 0 and tokens_BT.max() < config.vocab_size),
            f"tokens_BT has ids outside 0 … {config.vocab_size - 1}",
        )
        return tokens_BT.astype(np.int32)

    def __repr__(self) -> str:
        return f"Run({str(self.directory)!r}, step={self.step})"


def _padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """The rows with zeros after them, all as long as the longest."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, ids in zip(padded, rows):
        row[: len(ids)] = ids
    return padded
