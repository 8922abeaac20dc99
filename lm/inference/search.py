"""Generation by looking further than the next token: beams, contrastive search, speculation.

`search` gives what `Generator.generate` gives, found in another way. Texts end where the model's
context does: no window slides.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np

from lm.config import Bounds, Count, NotNegative, Path, Positive, Share, check
from lm.inference import beam, contrastive, speculation
from lm.inference.generate import Generation, Generator, Timing
from lm.inference.grammar import Grammar
from lm.inference.prepare import mesh_of
from lm.inference.prompts import NOTHING, padded, round_up
from lm.inference.sampling import SamplingConfig, warping
from lm.models import ModelConfig
from lm.models.matmul import compute_dtype
from lm.parallel.platform import device_memory

STEPS = 32  # tokens of a text in one dispatch
PASSES = 4  # of a model that reads guesses, in one dispatch
_PROGRAMS: dict[tuple, jax.stages.Compiled] = {}


@dataclasses.dataclass(frozen=True)
class SearchConfig(SamplingConfig):
    """How to draw, and how to search; one of beams, contrastive search and speculation.

    Beams are the likeliest texts, whatever `temperature`, `top_k` and `top_p` say, unless they are
    drawn. `num_samples` are the best of `num_beams`.
    """

    num_beams: Annotated[int, Bounds(1, 4096)] = 1  # texts kept at every step; 1: no beam search
    # A text's score is the sum of its log-probabilities over length ** length_penalty: above 0 it
    # favors long texts.
    length_penalty: float = 1.0
    # When a search ends: at num_beams ended texts (True), when the likeliest of the others would
    # not be better if it ended now (False), or whenever it ended ("never").
    early_stopping: Literal[False, True, "never"] = False
    beam_sampling: bool = False  # draws the beams, by temperature, top_k and top_p
    num_beam_groups: Positive = 1  # groups of beams that avoid each other's tokens
    diversity_penalty: NotNegative = 0.0  # from a log-probability, each time a group took the token
    penalty_alpha: Share = 0.0  # contrastive search of `top_k` candidates: the share of its penalty
    draft: Path = ""  # a run whose smaller model guesses tokens, of which the model keeps some
    prompt_lookup: Count = 0  # so many tokens are guessed: what followed the last ones before
    draft_tokens: Annotated[int, Bounds(1, 64)] = 4  # that `draft` guesses at a time

    @property
    def strategy(self) -> str:
        """The field that says how to search; "" where nothing is searched."""
        asked = {
            "num_beams": self.num_beams > 1,
            "penalty_alpha": self.penalty_alpha > 0,
            "draft": bool(self.draft),
            "prompt_lookup": self.prompt_lookup > 0,
        }
        return next((name for name, is_asked in asked.items() if is_asked), "")

    def validate(self, prefix: str = "config") -> None:
        """Raises `ConfigError` naming fields that do not go together."""
        super().validate(prefix)
        fields = {name: getattr(self, name) for name in SearchConfig.__annotations__}

        def shown(name: str) -> str:
            return f"{prefix}.{name}={fields.get(name, getattr(self, name))!r}"

        kind = self.strategy
        for other in ("penalty_alpha", "draft", "prompt_lookup"):
            check(
                not fields[other] or other == kind,
                f"{shown(other)} and {shown(kind or other)} exclude each other: set one of them",
            )
        if kind != "num_beams":
            plain = SearchConfig()
            for name in ("length_penalty", "early_stopping", "beam_sampling", "num_beam_groups",
                         "diversity_penalty"):  # fmt: skip
                check(
                    fields[name] == getattr(plain, name),
                    f"{shown(name)} is for beams: set {prefix}.num_beams",
                )
        else:
            self._validate_beams(prefix, shown)
        if kind == "penalty_alpha":
            check(
                (self.top_k or 0) > 1 and self.num_samples == 1,
                f"{shown('penalty_alpha')} chooses one of the {prefix}.top_k likeliest tokens: set "
                f"top_k to 2 or more (4, say), and num_samples to 1, not top_k={self.top_k!r} and "
                f"num_samples={self.num_samples}",
            )

    def _validate_beams(self, prefix: str, shown: Callable[[str], str]) -> None:
        check(
            self.num_samples <= self.num_beams,
            f"{shown('num_samples')} must be at most {shown('num_beams')}, of which they are the "
            "best",
        )
        check(
            self.num_beams % self.num_beam_groups == 0,
            f"{shown('num_beam_groups')} must divide {shown('num_beams')}",
        )
        check(
            (self.num_beam_groups > 1) == (self.diversity_penalty > 0),
            f"{shown('num_beam_groups')} and {shown('diversity_penalty')} go together: set "
            "neither, or both: to 2 or more, and to above 0",
        )
        check(
            not self.beam_sampling or (self.num_beam_groups == 1 and not self.greedy),
            f"{shown('beam_sampling')} needs {prefix}.num_beam_groups=1 and a temperature above 0: "
            f"not {shown('num_beam_groups')} and {shown('temperature')}",
        )


@dataclasses.dataclass
class SearchTiming(Timing):
    """And what guessing did: see `lm.inference.speculation`."""

    guessed: int = 0  # tokens
    kept: int = 0  # of them
    passes: int = 0  # of the model, each row's counted apart

    def __str__(self) -> str:
        text = super().__str__()
        if not self.passes:
            return text
        share = f"{100 * self.kept / max(self.guessed, 1):.0f} % of {self.guessed:,} guesses kept"
        return f"{text} · {share}, {1 + self.kept / self.passes:.2f} tokens a pass"


def search(
    generator: Generator,
    prompts: Sequence[Sequence[int]],
    config: SearchConfig,
    seed: int = 0,
    draft: Generator | None = None,
    grammar: Grammar | None = None,
) -> Generation:
    """Continues every prompt as `config` says; iterate over the result as over a `Generation`.

    Of beams, all tokens come at the end.

    Args:
      generator: of the model.
      prompts: token ids, at least one each.
      config: how; where it asks for no search, this is `generator.generate`.
      seed: of the random draws.
      draft: of the draft model, where there is one; it reads and writes the same ids.
      grammar: what the texts keep to; not where anything is searched.

    Raises:
      ConfigError: as `generator.generate`; a draft whose model or tokens are of another kind, or
        whose context is shorter than the texts; guesses for a recurrent model, which cannot take
        back what it has read.
    """
    kind = config.strategy
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(SamplingConfig)}
    check(
        kind != "num_beams" or not config.stop,
        f"stop={config.stop!r} does not go with num_beams={config.num_beams}, whose texts are "
        "compared at their ends: use stop_ids",
    )
    check(
        not (kind and grammar),
        f"{kind}={getattr(config, kind or 'draft')!r} does not go with a json_schema, regex or "
        "grammar: texts that keep to one are drawn token by token",
    )
    cache = generator.engine.config.cache
    check(
        not kind or cache == "compute",
        f"{kind}={getattr(config, kind or 'draft')!r} does not go with cache={cache!r}: a search "
        "keeps keys and values in the compute dtype: use cache='compute'",
    )
    generation = generator.generate(prompts, SamplingConfig(**plain), seed, grammar=grammar)
    if not kind:
        return generation
    searching = Search(generator, prompts, generation.read, config, seed, draft)
    rows = {"num_beams": config.num_beams, "penalty_alpha": config.top_k}
    name = kind if kind in rows else "num_samples"
    longest = max(map(len, generation.read)) + int(searching.limit_P.max())
    _check_memory(generator.model.config, len(prompts), name, rows.get(kind, config.num_samples),
                  min(longest, generator.context))  # fmt: skip
    if kind in ("draft", "prompt_lookup"):
        for each in (generator, draft or generator):
            check(
                each.model.config.cell == "attention",
                f"{kind}={getattr(config, kind)!r} guesses tokens, and config.model.cell="
                f"{each.model.config.cell!r} cannot take back what it has read: use Transformers",
            )
    if kind != "num_beams":
        for each in (generator, draft or generator):
            _check_angles(kind, config, each.model.config, searching)
    if kind == "draft":
        check(draft is not None, f"draft={config.draft!r} needs the generator of the draft")
        _check_draft(generator, draft, searching)
    return searching


def _check_angles(kind: str, config: SearchConfig, model: ModelConfig, searching: Search) -> None:
    """Refuses texts whose angles change on the way: their tokens are compared to stale ones."""
    for ids, limit in zip(searching.read, searching.limit_P.tolist()):
        steady = model.angles_until(len(ids))
        check(
            steady is None or len(ids) + limit <= steady,
            f"{kind}={getattr(config, kind)!r} does not go with rotary_scaling="
            f"{model.rotary_scaling!r} in a text that grows from {len(ids)} tokens to "
            f"{len(ids) + limit}, beyond {steady}: ask for fewer max_new_tokens, or for no search",
        )


def _check_draft(generator: Generator, draft: Generator, searching: Search) -> None:
    ours, other = generator.model.config, draft.model.config
    check(
        ours.architecture == other.architecture,
        f"draft has a model of architecture={other.architecture!r}, and must be of "
        f"{ours.architecture!r}",
    )
    prints = [each.tokenizer and each.tokenizer.fingerprint for each in (generator, draft)]
    check(
        prints[0] == prints[1] and generator.vocab_size == draft.vocab_size,
        "draft has another tokenizer than the model: a draft must read and write the same ids",
    )
    lengths = [len(ids) for ids in searching.read]
    added = searching.limit_P - 1  # the last token drawn is not read
    longest = max(*lengths, *added) if generator.encodes else max(np.array(lengths) + added)
    check(
        longest <= other.max_length,
        f"draft has a context of {other.max_length} tokens, and the texts need {longest}: ask for "
        "fewer max_new_tokens, or take a draft of a longer context",
    )


def _check_memory(config: ModelConfig, prompts: int, name: str, each: int, length: int) -> None:
    """Raises ConfigError where so many rows cannot fit: a rough count, before any is made."""
    cached = config.num_layers * length * config.cached_numbers
    row = cached * compute_dtype(config.compute_dtype).itemsize + 8 * config.vocab_size
    has = device_memory()
    check(
        has is None or prompts * each * row <= has,
        f"{name}={each} of {prompts} prompt(s) need {prompts * each * row / 2**30:,.1f} "
        f"GiB to remember {length} tokens each, and there are {(has or 0) / 2**30:,.1f} GiB: ask "
        f"for {max((has or 0) // (row * prompts), 1):,} at most",
    )


class Search(Generation):
    """A `Generation` whose tokens are found by `config`.

    Attributes beside those of a `Generation`, complete when the iteration is:
      scores: of beams, each row's: its log-probabilities' sum over length ** length_penalty.
    """

    def __init__(
        self,
        generator: Generator,
        prompts: Sequence[Sequence[int]],
        read: Sequence[Sequence[int]],
        config: SearchConfig,
        seed: int,
        draft: Generator | None,
    ):
        self._config, self._draft = generator.framing.allowed(config), draft
        self.scores: list[float] = []
        super().__init__(generator, prompts, read, config, seed)
        room_P = np.array([generator.room(len(ids)) for ids in read], np.int32)
        if config.strategy == "penalty_alpha":
            room_P -= 1  # of every candidate, the last one too, the hidden state is asked for
        self.limit_P = np.minimum(room_P, config.max_new_tokens)

    def _start(self) -> None:
        super()._start()
        self.timing = SearchTiming()

    def _gained(self) -> Iterator[dict[int, list[int]]]:
        generator, config = self._generator, self._config
        end = generator.framing.end_of_text
        stop = config.ends(end)
        self._warping, self._kind = warping([config], generator.vocab_size, end)
        self._common = (stop, generator.vocab_size)
        self._prompt = generator.prompt(self.read)
        kinds = {"num_beams": self._beams, "penalty_alpha": self._contrast}
        for tokens_BN in kinds.get(config.strategy, self._speculate)():
            tokens: dict[int, list[int]] = {}
            for row, ids in enumerate(tokens_BN.tolist()):
                if not self.ended[row]:  # by a stop string, which the device does not know
                    tokens[row] = [id for id in ids if id != NOTHING]
                    self.ended[row] = not set(stop).isdisjoint(tokens[row])
            self.timing.tokens += sum(map(len, tokens.values()))
            yield tokens
            if all(self.ended):
                return

    def _beams(self) -> Iterator[np.ndarray]:
        config, params = self._config, self._generator.params
        beams = beam.Beams(
            self._generator.model.config,
            *self._common,
            width=config.num_beams // config.num_beam_groups,
            groups=config.num_beam_groups,
            early_stopping=config.early_stopping,
            kind=self._kind,
            draws=config.beam_sampling,
        )
        asked = beam.Search(
            np.uint32(self._seed),
            self.limit_P,
            np.float32(config.length_penalty),
            np.float32(config.diversity_penalty),
            self._warping,
            # What the decoder must begin with after its start counts as written.
            np.float32(max(0, self._prompt.tokens_PT.shape[1] - 1) * self._generator.encodes),
        )
        slots, steps = self._slots(), round_up(int(self.limit_P.max()), STEPS)
        state = self._run(beam.begin, (beams, slots, steps), params, self._prompt, asked)
        done = False
        while not done:
            state, done = self._run(beam.advance, (beams, STEPS), params, asked, state)
        texts, self.scores = beam.best(state, config.num_samples)
        tokens_BN = np.full((len(texts), max(map(len, texts))), NOTHING, np.int32)
        for row, ids in enumerate(texts):
            tokens_BN[row, : len(ids)] = ids
        yield tokens_BN

    def _contrast(self) -> Iterator[np.ndarray]:
        config, params = self._config, self._generator.params
        k = min(config.top_k, self._generator.vocab_size)
        contrast = contrastive.Contrast(
            self._generator.model.config, *self._common, k=k, kind=self._kind
        )
        asked = contrastive.Search(np.float32(config.penalty_alpha), self.limit_P, self._warping)
        statics = (contrast, self._slots())
        state = self._run(contrastive.begin, statics, params, self._prompt, asked)
        done = False
        while not done:
            statics = (contrast, STEPS)
            state, tokens_PN, done = self._run(contrastive.advance, statics, params, asked, state)
            yield np.asarray(tokens_PN)

    def _speculate(self) -> Iterator[np.ndarray]:
        config, draft = self._config, self._draft
        settings = speculation.Speculation(
            self._generator.model.config,
            draft.model.config if draft else None,
            self._kind,
            *self._common,
            guesses=config.draft_tokens if draft else config.prompt_lookup,
        )
        params = speculation.Params(self._generator.params, draft.params if draft else None)
        ids_PR, positions_PR = padded(self.read, self._generator.context)
        read_PR = np.where(positions_PR < 0, NOTHING, ids_PR)
        limit_B = np.repeat(self.limit_P, config.num_samples)
        statics = (settings, self._slots(settings.guesses + 1))
        seed = np.uint32(self._seed)
        arguments = (params, self._prompt, read_PR, seed, limit_B, self._warping)
        state, tokens_BN, done = self._run(speculation.begin, statics, *arguments)
        yield np.asarray(tokens_BN)
        while not done:
            statics = (settings, PASSES)
            state, tokens_BN, done = self._run(speculation.advance, statics, params, state)
            self.timing.passes = int(state.passes_B.sum())
            self.timing.guessed = int(state.guessed_B.sum())
            self.timing.kept = int(state.kept_B.sum())
            yield np.asarray(tokens_BN)

    def _slots(self, more: int = 0) -> int:
        longest = self._prompt.tokens_PT.shape[1] + int(self.limit_P.max())
        return round_up(longest + more, 64)

    def _run(self, function: Callable, statics: tuple, *arguments: Any) -> Any:
        """Calls a function of static and other arguments, compiled once; the state is donated."""
        leaves, tree = jax.tree.flatten(arguments)
        mesh = mesh_of(jax.tree.leaves(self._generator.params)[0])
        shapes = tuple((np.shape(x), x.dtype) for x in leaves)
        key = (function, statics, tree, mesh, shapes)
        began = time.perf_counter()
        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            if key not in _PROGRAMS:
                states = (beam.State, contrastive.State, speculation.State)
                last = len(statics) + len(arguments) - 1
                jitted = jax.jit(
                    function,
                    static_argnums=tuple(range(len(statics))),
                    donate_argnums=(last,) if isinstance(arguments[-1], states) else (),
                )
                _PROGRAMS[key] = jitted.lower(*statics, *arguments).compile()
                self.timing.compile_seconds += time.perf_counter() - began
                began = time.perf_counter()
            out = jax.block_until_ready(_PROGRAMS[key](*arguments))
        took, timing = time.perf_counter() - began, self.timing
        if not timing.seconds:
            timing.first_token_seconds = took
        timing.seconds += took
        return out
