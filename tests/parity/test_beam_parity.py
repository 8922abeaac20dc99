"""Beam search of random imported models gives the texts and scores of `transformers.generate`.

Version 5 of transformers has moved diverse beams and contrastive search to repositories of the hub;
tests/inference/test_search.py checks those, by their papers' definitions.
"""

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import encoder_oracles  # noqa: E402
import family_checks  # noqa: E402

from lm.inference import Framing, Generator, SearchConfig, search  # noqa: E402
from lm.inference.prompts import NOTHING  # noqa: E402
from lm.models import skeleton  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

NEW = 14  # past Gemma's window of 5
NAMES = ["gpt2", "llama", "gemma2", "t5", "bart"]
FAST = ("gemma2", "t5")
# width, length penalty, early stopping
SETTINGS = [
    (4, 1.0, False),
    (3, 0.0, "never"),
    (2, 2.0, True),
    (5, -1.0, False),
    (6, 0.6, "never"),
    (8, 1.0, True),
]


def cases():
    """The first settings for every model, and for each two others, so that each meets two."""
    for i, name in enumerate(NAMES):
        yield pytest.param(name, *SETTINGS[0], marks=() if name in FAST else pytest.mark.slow)
        for other in (i % 5, (i + 2) % 5):
            yield pytest.param(name, *SETTINGS[1 + other], marks=pytest.mark.slow)


@dataclasses.dataclass
class Both:
    """A model there and here, and prompts of different lengths."""

    model: object
    generator: Generator
    prompts: list[list[int]]
    inputs: dict
    ends: dict

    def alone(self, prompt: int):
        """With one prompt only, and no padding: transformers' penalties are for it, too."""
        length = len(self.prompts[prompt])
        ids, mask = torch.tensor([self.prompts[prompt]]), torch.ones(1, length, dtype=torch.long)
        inputs = {"input_ids": ids, "attention_mask": mask}
        return dataclasses.replace(self, prompts=[self.prompts[prompt]], inputs=inputs)


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in NAMES],
)
def both(request, tmp_path_factory):
    name, directory = request.param, tmp_path_factory.mktemp("original")
    decodes = name in decoder_oracles.CASES
    if decodes:
        model, ends = decoder_oracles.build(name), {"pad_token_id": 0}
        batch = family_checks.text_batch(rows=3)
        prompts = [row[:n].tolist() for row, n in zip(batch["inputs"], (3, 9, 5))]
        longest = max(map(len, prompts))
        ids = [[0] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    else:
        model = encoder_oracles.build(name, seed=17)
        with torch.no_grad():
            encoder_oracles.restless(model)
        kind = encoder_oracles.ENDS[encoder_oracles.CASES[name].kind]
        ends = {"decoder_start_token_id": kind["start"], "pad_token_id": kind["pad"]}
        batch = encoder_oracles.random_batch(name)
        ids, mask = batch["source"].tolist(), batch["source_mask"].tolist()
        prompts = [[t for t, on in zip(*row) if on] for row in zip(ids, mask)]
    model.save_pretrained(directory)
    _, config, params = family_checks.load(directory)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    both = Both(model, None, prompts, inputs, ends)
    greedy = theirs(both, num_beams=1)[0]
    # Greedy search would write this in the middle of the first text: it ends some beams.
    both.ends = {**ends, "eos_token_id": greedy[0][NEW // 2]}
    start = (ends["decoder_start_token_id"],) if not decodes else ()
    framing = Framing(end_of_text=(both.ends["eos_token_id"],), decoder_start=start)
    both.generator = Generator(skeleton(config), params, framing)
    return both


def theirs(both, **fields):
    """Each row's new tokens, up to the end, and the scores."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True}
    both.model.generation_config = transformers.GenerationConfig()
    config = transformers.GenerationConfig(
        **settings, output_scores=True, **{"eos_token_id": None, **both.ends}, **fields
    )
    out = both.model.generate(**both.inputs, generation_config=config)
    read = 1 if "decoder_start_token_id" in both.ends else both.inputs["input_ids"].shape[1]
    rows = out.sequences[:, read:].tolist()
    end = both.ends.get("eos_token_id")
    rows = [row[: row.index(end) + 1] if end in row else row for row in rows]
    return rows, getattr(out, "sequences_scores", None)


def ours(both, **fields):
    config = SearchConfig(max_new_tokens=NEW, **fields)
    found = search(both.generator, both.prompts, config)
    drawn_BN = np.concatenate(list(found), 1)
    return [[t for t in row if t != NOTHING] for row in drawn_BN.tolist()], found


@pytest.mark.parametrize("both, width, penalty, early", list(cases()), indirect=["both"])
def test_texts_and_scores_are_those_of_transformers(both, width, penalty, early):
    fields = {"num_beams": width, "length_penalty": penalty, "early_stopping": early}
    expected, scores = theirs(both, num_return_sequences=width, **fields)
    rows, found = ours(both, num_samples=width, **fields)
    assert rows == expected
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-4)
    assert len({tuple(row) for row in rows}) > width


def test_guesses_change_nothing_of_greedy_search(both):
    expected, _ = theirs(both, num_beams=1)
    rows, found = ours(both, temperature=0, prompt_lookup=3)
    assert rows == expected
    assert found.timing.guessed > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "both, prompt", [(name, i % 2) for i, name in enumerate(NAMES)], indirect=["both"]
)
def test_beams_heed_penalties_as_those_of_transformers_do(both, prompt):
    one, fields = both.alone(prompt), {"num_beams": 4}
    fields |= {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 5}
    expected, scores = theirs(one, num_return_sequences=4, **fields)
    rows, found = ours(one, num_samples=4, **fields)
    assert rows == expected
    np.testing.assert_allclose(found.scores, scores, rtol=1e-4, atol=1e-4)
    assert rows != ours(one, num_samples=4, num_beams=4)[0]
