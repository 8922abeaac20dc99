"""What stands behind sentinels: the stretches of text that a T5 writes (Raffel et al. 2020)."""

from __future__ import annotations

from lm.config import check
from lm.inference.config import SamplingConfig
from lm.inference.encode import marked_ids
from lm.inference.framing import Framing
from lm.inference.generate import NOTHING, Generator
from lm.tokenizers import Tokenizer


def fill_spans(
    generator: Generator,
    tokenizer: Tokenizer,
    framing: Framing,
    text: str,
    max_new_tokens: int = 100,
) -> list[str]:
    """The likeliest stretch of text for each sentinel, by greedy decoding.

    Args:
      generator: of an encoder-decoder trained on span corruption.
      tokenizer: has sentinels; their names in `text`, such as "<extra_id_0>", stand for them.
      framing: what stands around the source, complete (`Framing.filled`).
      text: "The cat <extra_id_0> on the <extra_id_1>.", its sentinels numbered from 0.
      max_new_tokens: of all stretches together.

    Returns:
      For each sentinel of the text what the model writes for it; empty where it writes nothing.

    Raises:
      ConfigError: not an encoder-decoder, no sentinels in the tokenizer or the text, sentinels out
        of order, or a text that is too long.
    """
    config = generator.model.config
    check(
        config.architecture == "encoder_decoder",
        f"config.model.architecture={config.architecture!r} cannot fill spans: it needs "
        "'encoder_decoder'",
    )
    asked, ids = sentinel_ids(tokenizer, text)
    marks = set(tokenizer.sentinel_ids)
    ids = [*(framing.before or ()), *ids, *(framing.after or ())]
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=max_new_tokens)
    written: dict[int, list[int]] = {}
    current: list[int] = []
    for tokens_1N in generator.generate([ids], sampling):
        for id in tokens_1N[0].tolist():
            if id in marks:
                current = written.setdefault(id, [])
            elif id != NOTHING:
                current.append(id)
    return [tokenizer.decode(written.get(id, [])).strip() for id in asked]


def sentinel_ids(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int]]:
    """The sentinels that `text` names, and its ids, in which they stand for themselves.

    Raises:
      ConfigError: no sentinels in the tokenizer or the text, or out of order.
    """
    check(
        len(tokenizer.sentinel_ids) > 0,
        "the tokenizer has no sentinels: train one with config.tokenizer.num_sentinels",
    )
    names = {id: name for name, id in tokenizer.special_ids.items()}
    marks = {names[id]: id for id in tokenizer.sentinel_ids}
    ids = marked_ids(tokenizer, text, marks)
    asked = [id for id in ids if id in marks.values()]
    check(
        bool(asked) and asked == list(tokenizer.sentinel_ids[: len(asked)]),
        f"text={text!r} must have {next(iter(marks))!r}, and further ones in order, where "
        "something is to be filled in",
    )
    return asked, ids
