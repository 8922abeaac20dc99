"""Files of pairs: JSON Lines, JSON, Parquet and tables."""

import dataclasses
import gzip
import json

import numpy as np
import pytest
from bytes_tokenizer import ByteTokenizer

from lm.config import ConfigError, view
from lm.data import DataConfig, documents, pairs, prepare, train_batches
from lm.data.corpora import num_training_characters, splits
from lm.data.corpora import source as open_source
from lm.data.files import CorpusReport

PAIRS = [("one", "eins"), ("two words", "zwei Wörter"), ("three 🎈", "drei 🎈")]
CONFIG = DataConfig(text_field=("source", "target"), validation_fraction=0.0)


def read(path, report=None, **changes):
    config = dataclasses.replace(CONFIG, path=str(path), **changes)
    return list(pairs(config, "train", 0, report))


def test_every_format_gives_the_same_pairs(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [{"id": 1, "target": target, "source": source} for source, target in PAIRS]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    (tmp_path / "c.json").write_text(json.dumps(records))
    table = {"target": [t for _, t in PAIRS], "source": [s for s, _ in PAIRS]}
    parquet.write_table(pyarrow.table(table), tmp_path / "d.parquet")
    plain = "".join(f"{source}\t{target}\n" for source, target in PAIRS)
    (tmp_path / "e.tsv").write_text(plain)
    (tmp_path / "f.tsv.gz").write_bytes(gzip.compress(plain.replace("\n", "\tCC-BY\r\n").encode()))
    named = "target\tid\tsource\n" + "".join(f"{t}\t1\t{s}\n" for s, t in PAIRS)
    (tmp_path / "g.tsv").write_text(named)
    for file in tmp_path.iterdir():
        assert read(file) == PAIRS, file.name
    assert read(tmp_path) == PAIRS * 7
    texts = documents(dataclasses.replace(CONFIG, path=str(tmp_path / "e.tsv")), "train", 0)
    assert list(texts) == [text for both in PAIRS for text in both]


def test_fields_may_have_other_names(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"en": "cat", "de": "Katze"}\n')
    assert read(tmp_path, text_field=("de", "en")) == [("Katze", "cat")]
    with pytest.raises(
        ConfigError, match=r"data\.text_field='sources' is not one of its fields.*'de'"
    ):
        read(tmp_path, text_field=("sources", "en"))
    with pytest.raises(ConfigError, match=r"text_field=.* must name a field, or two for pairs"):
        view(DataConfig, {"text_field": ("a", "b", "c")}, "config.data")


def test_bad_pairs_are_counted_with_their_reason_or_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\nonly one\n\nc\t\nd\te\n")
    (tmp_path / "b.jsonl").write_text('{"source": "f", "target": "g"}\n{"source": "h"}\n["i"]\n')
    (tmp_path / "c.txt").write_text("running text")
    report = CorpusReport()
    assert read(tmp_path, report) == [("a", "b"), ("d", "e"), ("f", "g")]
    assert [line.split(": ")[1].split(",")[0] for line in report.skipped] == [
        "not two columns",
        "no text",
        "no text",
        "no text",
        "pairs are read from .jsonl",
    ]
    with pytest.raises(ConfigError, match=r"a\.tsv line 2 is bad: not two columns"):
        read(tmp_path, on_bad_file="refuse")


def test_a_table_is_plain_text_unless_pairs_are_asked_for(tmp_path):
    (tmp_path / "a.tsv").write_text("a\tb\n")
    config = DataConfig(path=str(tmp_path), validation_fraction=0.0)
    assert list(documents(config, "train", 0)) == ["a\tb\n"]
    with pytest.raises(ConfigError, match=r"holds documents, not pairs: use 'translation'"):
        list(pairs(config, "train", 0))


def test_pairs_are_never_cut_apart_by_the_split(tmp_path):
    table = "".join(f"source {i}\t{'target ' * (i % 7)}{i}\n" for i in range(200))
    (tmp_path / "a.tsv").write_text(table)
    whole = read(tmp_path)
    for split in ("hash", "position"):
        config = dataclasses.replace(
            CONFIG, path=str(tmp_path), split=split, validation_fraction=0.3
        )
        corpus = open_source(str(tmp_path), config, 0)
        left = num_training_characters(corpus, CorpusReport())
        parts = list(splits(corpus, CorpusReport(), left))
        assert [item for _, item in parts] == whole
        names = [name for name, _ in parts]
        assert 30 < names.count("validation") < 90
        if split == "position":
            assert names == sorted(names), "what comes last is held out"
    # A pair goes where its source belongs, whatever its target.
    table = "".join(f"source {i % 50}\ttarget {i}\n" for i in range(200))
    (tmp_path / "a.tsv").write_text(table)
    config = dataclasses.replace(CONFIG, path=str(tmp_path), validation_fraction=0.3)
    sides = [{source for source, _ in pairs(config, s, 0)} for s in ("train", "validation")]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 50


def test_the_cache_knows_pairs_from_documents(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text('{"source": "f", "target": "g", "text": "h"}\n')
    config = dataclasses.replace(CONFIG, path=str(tmp_path / "data"), cache_dir=str(tmp_path / "c"))
    (both,), _ = prepare(config, ByteTokenizer(), 0)
    (alone,), _ = prepare(dataclasses.replace(config, text_field="text"), ByteTokenizer(), 0)
    assert both.pairs and not alone.pairs
    assert both.tokens.tolist() == [ord("f"), 256, ord("g"), 256]
    assert alone.tokens.tolist() == [ord("h"), 256]


def test_pairs_have_the_ids_around_them_that_the_config_says(tmp_path):
    class Sized(ByteTokenizer):
        def byte_lengths(self):
            return np.ones(self.vocab_size, int)

    (tmp_path / "pairs.tsv").write_text("ab\tc\nd\tefg\n")
    around = {"source_before": (7, 8), "source_after": (9,), "target_start": (5, 6)}
    config = dataclasses.replace(
        CONFIG,
        path=str(tmp_path / "pairs.tsv"),
        cache_dir=str(tmp_path / "tokens"),
        batch_size=2,
        block_size=8,
        packing="none",
        **around,
    )
    corpora, _ = prepare(config, Sized(), 0)
    batch = train_batches(config, corpora, seed=0, objective="seq2seq", tokenizer=Sized()).batch(0)
    sides = ("source", "source_segment_ids"), ("inputs", "segment_ids"), ("targets", "segment_ids")
    found = {
        tuple(
            tuple(row[kept > 0].tolist()) for row, kept in zip(rows[::2], rows[1::2], strict=True)
        )
        for rows in zip(*(batch[name] for side in sides for name in side), strict=True)
    }
    end = Sized.eos_id
    assert found == {
        ((7, 8, *b"ab", end, 9), (5, 6, *b"c"), (6, *b"c", end)),
        ((7, 8, *b"d", end, 9), (5, 6, *b"efg"), (6, *b"efg", end)),
    }
