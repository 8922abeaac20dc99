"""Batches of conversations: what weighs, what is packed, cut and left out, and where they go on."""

import dataclasses
import json

import numpy as np
import pytest

from lm.config import ConfigError
from lm.data import DataConfig, evaluation_batches, prepare, train_batches
from lm.tokenizers import TokenizerConfig, chat_template, learned, train

TOKENIZER = train(TokenizerConfig(kind="byte", chat_template="chatml"), [])
CHAT = chat_template(TOKENIZER, begin=[TOKENIZER.bos_id])
END = TOKENIZER.special_ids["<|im_end|>"]


def talk(number):
    said = [f"Question {number}?", "A" * (1 + number % 7), "And?", f"B{number}"]
    roles = ["user", "assistant"] * 2
    turns = 2 if number % 3 else 4
    return [{"role": r, "content": c} for r, c in zip(roles, said)][:turns]


TALKS = [{"messages": talk(number)} for number in range(40)]
PAIRS = [
    {"prompt": f"Question {n}?", "chosen": "yes" * (1 + n % 3), "rejected": "no", "margin": n}
    for n in range(20)
]
LABELLED = [{"prompt": f"Question {n}?", "completion": f"a{n}", "label": n % 2} for n in range(7)]


def config(tmp_path, lines, **fields):
    path = tmp_path / "lines.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fields = {"batch_size": 4, "block_size": 128, "packing": "best_fit", **fields}
    return DataConfig(
        path=str(path), cache_dir=str(tmp_path / "tokens"), validation_fraction=0.0, **fields
    )


def corpora(data, objective="sft", notify=lambda line: None):
    return prepare(data, TOKENIZER, 0, notify, objective, CHAT)[0]


def epoch(data, objective="sft"):
    data = dataclasses.replace(data, epochs=1)
    batches = train_batches(data, corpora(data, objective), seed=1, objective=objective)
    found = list(batches)
    assert all({n: a.shape for n, a in batch.items()} == batches.shapes for batch in found)
    return {name: np.concatenate([b[name] for b in found]) for name in found[0]}


def segments(batch):
    """inputs, targets, weights and positions of every segment."""
    for row in range(len(batch["inputs"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            at = batch["segment_ids"][row] == segment
            yield [
                batch[name][row][at].tolist()
                for name in ("inputs", "targets", "weights", "positions")
            ]


@pytest.mark.parametrize("packing", ["best_fit", "none"])
def test_every_conversation_comes_once_and_weighs_where_the_assistant_speaks(tmp_path, packing):
    batch = epoch(config(tmp_path, TALKS, packing=packing))
    wanted = []
    for line in TALKS:
        ids, flags = learned(CHAT, line["messages"])
        last = len(flags) - flags[::-1].index(True)
        assert ids[last - 1] == END
        wanted.append((ids[: last - 1], ids[1:last], [float(f) for f in flags[1:last]]))
    found = []
    for inputs, targets, weights, positions in segments(batch):
        assert positions == list(range(len(inputs)))
        found.append((inputs, targets, weights))
    assert sorted(found) == sorted(wanted)
    assert (batch["weights"][batch["segment_ids"] == 0] == 0).all()
    assert (batch["segment_ids"].max(1).max() > 1) == (packing == "best_fit")


def test_replies_of_a_pair_share_their_prompt_and_lie_side_by_side(tmp_path):
    batch = epoch(config(tmp_path, PAIRS, batch_size=5), "dpo")
    assert batch["inputs"].shape == (20, 2, 128) and batch["margin"].shape == (20,)
    for row in range(20):
        number = int(batch["margin"][row])
        borders = batch["weights"][row].argmax(1)
        assert borders[0] == borders[1]
        prompt = CHAT.encode([{"role": "user", "content": f"Question {number}?"}])
        for side, said in enumerate(("yes" * (1 + number % 3), "no")):
            used = batch["segment_ids"][row, side] == 1
            inputs, targets = (batch[n][row, side][used].tolist() for n in ("inputs", "targets"))
            assert [*inputs, targets[-1]] == [*prompt, *said.encode(), END]
            assert batch["weights"][row, side].sum() == len(said) + 1
            assert (batch["positions"][row, side][used] == np.arange(used.sum())).all()


def test_a_labelled_reply_comes_with_another_one_to_its_prompt(tmp_path):
    batch = epoch(config(tmp_path, LABELLED, batch_size=7), "kto")
    assert batch["label"].sum() == 3 and batch["inputs"].shape == (7, 2, 128)
    for row in range(7):
        texts = [TOKENIZER.decode(batch["targets"][row, side]) for side in (0, 1)]
        question = texts[0].split("?")[0]
        assert texts[1].startswith(question) and texts[0].strip("\0") != texts[1].strip("\0")
        assert batch["label"][row] == int(question[-1]) % 2
    both = epoch(config(tmp_path, PAIRS, batch_size=4), "kto")  # a pair is two replies
    assert len(both["label"]) == 40 and both["label"].sum() == 20


def test_batches_are_a_function_of_their_number_and_go_on_where_they_were(tmp_path):
    data = config(tmp_path, TALKS)
    for objective, lines in (("sft", TALKS), ("dpo", PAIRS)):
        data = config(tmp_path, lines)
        reading = {"seed": 3, "objective": objective}
        one = train_batches(data, corpora(data, objective), **reading)
        first = [next(one) for _ in range(7)]
        other = train_batches(data, corpora(data, objective), **reading)
        other.set_state(json.loads(json.dumps(one.get_state())))
        for name, array in next(other).items():
            np.testing.assert_array_equal(array, one.batch(7)[name])
            np.testing.assert_array_equal(first[5][name], other.batch(5)[name])
        some = train_batches(data, corpora(data, objective), rows=[1, 3], **reading)
        for name, array in some.batch(5).items():
            np.testing.assert_array_equal(array, first[5][name][[1, 3]])
        with pytest.raises(ConfigError, match=r"data\.long_conversations='drop'"):
            dropping = dataclasses.replace(data, long_conversations="drop")
            train_batches(dropping, corpora(data, objective), **reading).set_state(one.get_state())


def test_what_is_too_long_is_cut_dropped_or_refused_and_counted(tmp_path):
    long = {"prompt": "Q?", "response": "x" * 200}
    unheard = {"prompt": "Q" * 300, "response": "y"}  # nothing to learn is left of it
    lines = [{"prompt": "Q?", "response": "A."}, long, unheard]
    data = config(tmp_path, lines)
    batches = train_batches(data, corpora(data), seed=0, objective="sft")
    assert (batches.num_dropped, batches.rows[0].num_cut) == (1, 1)
    assert "1 cut and 1 left out of 3 conversations" in batches.notes[0]
    batch = epoch(data)
    found = list(segments(batch))
    assert len(found) == 2 and max(len(f[0]) for f in found) == 128
    assert all(sum(f[2]) > 0 for f in found)
    dropping = dataclasses.replace(data, long_conversations="drop")
    assert train_batches(dropping, corpora(data), seed=0, objective="sft").num_dropped == 2
    with pytest.raises(ConfigError, match="shorter than 2 conversations"):
        refusing = dataclasses.replace(data, long_conversations="refuse")
        train_batches(refusing, corpora(data), seed=0, objective="sft")
    with pytest.raises(ConfigError, match=r"no conversations of .* fit"):
        short = dataclasses.replace(data, block_size=8)
        train_batches(short, corpora(data), seed=0, objective="sft")


def test_conversations_without_an_assistant_are_left_out_and_counted(tmp_path):
    told = []
    silent = {"messages": [{"role": "user", "content": "Hello?"}]}
    data = config(tmp_path, [silent, *TALKS[:3], silent])
    (corpus,) = corpora(data, notify=told.append)
    assert corpus.num_documents == 3
    assert any("2 without a word to learn are left out" in line for line in told)
    with pytest.raises(ConfigError, match="no word of an assistant to learn"):
        corpora(config(tmp_path, [silent]))


def test_tokens_are_kept_and_made_again_for_another_template(tmp_path):
    data = config(tmp_path, TALKS)
    told = []
    (first,) = corpora(data, notify=told.append)
    assert any(line.startswith("tokenising") for line in told)
    told.clear()
    (again,) = corpora(data, notify=told.append)
    assert not told and again.key == first.key
    np.testing.assert_array_equal(first.learned, again.learned)
    plain = chat_template(TOKENIZER, "plain", [TOKENIZER.bos_id])
    (other,) = prepare(data, TOKENIZER, 0, told.append, "sft", plain)[0]
    assert told and other.key != first.key
    for file in (tmp_path / "tokens" / "conversations").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    (mended,) = corpora(data, notify=told.append)
    np.testing.assert_array_equal(first.tokens, mended.tokens)


def test_evaluation_sees_every_conversation_once(tmp_path):
    data = config(tmp_path, TALKS, batch_size=3)
    batches = evaluation_batches(data, corpora(data), objective="sft")
    found = [segment for batch in batches for segment in segments(batch)]
    assert len(found) == 40 and batches.num_bytes is None


def test_conversations_are_not_cut_anywhere(tmp_path):
    data = config(tmp_path, TALKS, packing="concat")
    with pytest.raises(ConfigError, match=r"data\.packing='concat'"):
        train_batches(data, corpora(data), seed=0, objective="sft")
