import bz2
import contextlib
import dataclasses
import gzip
import json
import lzma
import os

import pytest

from lm.config import ConfigError, defaults, view
from lm.data import corpus_fingerprint
from lm.data.config import DataConfig
from lm.data.corpora import documents, pairs, source, split_of
from lm.data.files import CorpusReport

EVERYTHING = DataConfig(validation_fraction=0.0)


def read(path, report=None, part="train", **changes):
    config = dataclasses.replace(EVERYTHING, path=str(path), **changes)
    return list(documents(config, part, 0, report))


def test_config_survives_the_view_and_the_command_line_types():
    config = defaults(DataConfig)
    assert view(DataConfig, config) == DataConfig()
    config.path = ("a", "b")
    config.weights = (1, 2.5)
    config.epochs = 3
    assert view(DataConfig, config).paths == ("a", "b")


@pytest.mark.parametrize(
    "field, value, names",
    [
        ("packing", "bestfit", "best_fit"),
        ("split", "hashed", "hash"),
        ("weights", (1.0, 2.0), "1 corpora"),
        ("batch_size", 0, "at least 1"),
        ("validation_fraction", 1.0, r"\[0, 1\)"),
        ("encoding", "utf-9", "encoding"),
        ("encoding", "hex", "encoding"),
        ("encoding", "undefined", "encoding"),
        ("epochs", 0, "at least 1"),
        ("path", "", "no corpus"),
        ("on_bad_file", "crash", "refuse"),
    ],
)
def test_impossible_settings_are_named(field, value, names):
    with pytest.raises(ConfigError, match=rf"config\.data\.{field}=.*{names}"):
        view(DataConfig, {field: value}, "config.data")


def test_every_format_gives_the_same_documents(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    zstandard = pytest.importorskip("zstandard")
    texts = ["one", "zwei\nZeilen", "três 🎈"]
    lines = "".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts).encode()
    (tmp_path / "a.jsonl").write_bytes(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    two_frames = zstandard.compress(lines[:10]) + zstandard.compress(lines[10:])
    (tmp_path / "c.jsonl.zst").write_bytes(two_frames)
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in texts]))
    (tmp_path / "e.json").write_bytes(lines)
    (tmp_path / "f.json").write_text(json.dumps(texts))
    (tmp_path / "h.ndjson.bz2").write_bytes(bz2.compress(lines[:9]) + bz2.compress(lines[9:]))
    (tmp_path / "i.jsonl.xz").write_bytes(lzma.compress(lines))
    parquet.write_table(pyarrow.table({"text": texts, "id": [1, 2, 3]}), tmp_path / "g.parquet")
    for file in tmp_path.iterdir():
        assert read(file) == texts, file.name
    assert read(tmp_path) == texts * 9
    assert read(tmp_path / "[ab].*") == texts * 2


def test_text_files_are_one_document_each_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.md").write_text("second")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffir\r\nst")
    (tmp_path / ".hidden").write_text("never")
    assert read(tmp_path) == ["fir\r\nst", "second"]
    assert read(f"{tmp_path}/**/*.md") == ["second"]


@pytest.mark.parametrize("name", ["gz", "zst", "bz2", "xz"])
def test_an_archive_cut_short_or_with_flipped_bytes_is_reported(tmp_path, name):
    packers = {"gz": gzip, "bz2": bz2, "xz": lzma}
    packer = packers.get(name) or pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": f"{i} {i**50}"}) + "\n" for i in range(300)).encode()
    whole = packer.compress(lines)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    path = tmp_path / f"x.jsonl.{name}"
    path.write_bytes(whole)
    assert len(read(path)) == 300
    for data in (whole[: len(whole) // 2], whole[:-1], whole + whole[:-3], whole[:3]):
        path.write_bytes(data)
        report = CorpusReport()
        try:
            read(path, report)
        except ConfigError as error:  # nothing at all could be read
            assert "holds no documents" in str(error)
        assert ": damaged archive" in report.skipped[-1], report.skipped
    if name != "zst":  # its frames have a checksum only where the writer asked for one
        path.write_bytes(flipped)
        report = CorpusReport()
        with contextlib.suppress(ConfigError):
            read(path, report)
        assert report.skipped


def test_unusable_files_are_counted_with_their_reason_or_refused(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "binary.txt").write_bytes(b"\x7fELF\0\0")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"hello" * 1000)[:-20])
    (tmp_path / "not.gz").write_bytes(bz2.compress(b"hello"))
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n{"text": "\\ud800"}\n')
    report = CorpusReport()
    assert read(tmp_path, report) == ["fine", "good"]
    reasons = dict(line.split("/")[-1].split(": ", 1) for line in report.skipped)
    assert reasons.pop("cut.gz").startswith("damaged archive")
    assert reasons.pop("not.gz").startswith("damaged archive")
    assert reasons == {
        "binary.txt": "binary",
        "latin.txt": "not utf-8 at byte 3",
        "empty.txt": "empty",
        "blank.txt": "empty",
        "bad.jsonl line 2": "not JSON",
        "bad.jsonl record 2": "half a surrogate pair",
    }
    assert len(report.lines()) == 8 and report.num_documents == 2
    with pytest.raises(ConfigError, match="on_bad_file='refuse'"):
        read(tmp_path, on_bad_file="refuse")
    assert read(tmp_path / "latin.txt", encoding="latin-1") == ["café"]


def test_mistakes_name_what_there_is(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"content": "x", "id": 3}\n')
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ConfigError, match=r"data\.text_field='contents'.*'content', 'id'.*did you"):
        read(tmp_path / "data.jsonl", text_field="contents")
    with pytest.raises(ConfigError, match="holds int, not text"):
        read(tmp_path / "data.jsonl", text_field="id")
    with pytest.raises(ConfigError, match=r"data\.path=.*does not exist.*data\.jsonl"):
        read(tmp_path / "datum.jsonl")
    with pytest.raises(ConfigError, match="did you mean 'storyworld'"):
        read("storyworl")
    with pytest.raises(ConfigError, match=r"holds no documents: 1 skipped .*empty"):
        read(tmp_path / "empty.txt")
    with pytest.raises(ConfigError, match=r"validation_path.*does not exist"):
        read(tmp_path / "data.jsonl", part="validation", validation_path="nowhere")


def test_one_bad_first_record_is_a_bad_record_like_any_other(tmp_path):
    good = [json.dumps({"text": f"text {i}"}) for i in range(3)]
    for bad in ('{"version": 1}', '{"text": 7}', "[1]", "{bad", "3"):
        for place in (0, 1):
            lines = [*good[:place], bad, *good[place:]]
            for name, data in (("x.jsonl", "\n".join(lines)), ("y.json", f"[{','.join(lines)}]")):
                if bad == "{bad" and name == "y.json":
                    continue
                (tmp_path / name).write_text(data)
                report = CorpusReport()
                assert read(tmp_path / name, report) == ["text 0", "text 1", "text 2"], bad
                (line,) = report.skipped
                assert f"{name} line {place + 1}: " in line or f" record {place + 1}: " in line
                with pytest.raises(ConfigError, match="on_bad_file='refuse'"):
                    read(tmp_path / name, on_bad_file="refuse")
    # Of a long file in which there is nothing but such records, the first thousand are enough.
    (tmp_path / "x.jsonl").write_text('{"version": 1}\n' * 1000 + good[0])
    with pytest.raises(ConfigError, match=r"1 skipped .*'text' is not one of .* 'version'"):
        read(tmp_path / "x.jsonl")


def test_lines_end_at_a_line_feed_and_nowhere_else(tmp_path):
    pytest.importorskip("zstandard")
    text = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\rh"
    line = json.dumps({"text": text}, ensure_ascii=False).replace("\\u0085", "\x85")
    assert "\u2028" in line and "\x85" in line
    pair = f"{text[:-2]}\tb"
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"):
        # "\u0a0d" has the byte of a line feed in UTF-16.
        data = f"{line}\n\n{line}\r\n" + '{"text": "\u0a0d"}'
        for name in ("x.jsonl", "x.json"):
            (tmp_path / name).write_bytes(data.encode(encoding))
            assert read(tmp_path / name, encoding=encoding) == [text, text, "\u0a0d"]
        (tmp_path / "x.tsv").write_bytes(f"\ufeff{pair}\r\n{pair}\n".encode(encoding))
        config = dataclasses.replace(EVERYTHING, path=str(tmp_path / "x.tsv"), encoding=encoding)
        config = dataclasses.replace(config, text_field="source,target")
        assert list(pairs(config, "train", 0)) == [(text[:-2], "b")] * 2
    (tmp_path / "x.txt").write_bytes("\ufeffplain".encode("utf-16-le"))
    with pytest.raises(ConfigError, match=r"data\.encoding='utf-16'"):
        read(tmp_path / "x.txt")
    assert read(tmp_path / "x.txt", encoding="utf-16-le") == ["plain"]


def test_a_separator_cuts_plain_text_into_documents(tmp_path):
    text = "One.\n\nstill one\n<|endoftext|>\nTwo.<|endoftext|> three\n<|endoftext|>\n"
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "x.jsonl").write_text('{"text": "a<|endoftext|>b"}')
    separated = {"document_separator": "<|endoftext|>"}
    documents_of_text = ["One.\n\nstill one", "Two.", " three"]
    assert read(tmp_path, **separated) == ["a<|endoftext|>b", *documents_of_text]
    assert read(tmp_path / "x.txt") == [text]
    assert len(read(tmp_path / "x.txt", document_separator=r"\n\n")) == 2


def test_a_folder_gives_its_data_through_links_and_says_what_it_leaves_out(tmp_path):
    """As the snapshot of a data set on the Hub looks, with all that may go wrong in it."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    for folder in (snapshot / "data", blobs / "more"):
        folder.mkdir(parents=True)
    (blobs / "0").write_text('{"text": "one"}\n')
    (snapshot / "data" / "train.jsonl").symlink_to(blobs / "0")
    (blobs / "more" / "b.jsonl").write_text('{"text": "two"}\n')
    (snapshot / "linked").symlink_to(blobs / "more")
    (snapshot / "again").symlink_to(blobs / "more")
    (snapshot / "data" / "round").symlink_to(snapshot)
    (snapshot / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    (snapshot / "README.md").write_text("# About")
    (snapshot / "LICENSE").write_text("Free.")
    (snapshot / ".gitattributes").write_text("*.parquet lfs")
    (snapshot / "dataset_infos.json").write_text('{"default": {"features": {"text": "x"}}}')
    (snapshot / "load.py").write_text("print()")
    (snapshot / "schema.json").write_text('{"title": "x"}')
    os.mkfifo(snapshot / "pipe")
    report = CorpusReport()
    assert sorted(read(snapshot, report)) == ["one", "two"]
    assert ["schema.json: " in line for line in report.skipped] == [True]
    (line,) = source(str(snapshot), EVERYTHING, 0).notes
    assert "README.md" in line and "gone.jsonl" in line and "and 1 more" in line, line
    with pytest.raises(ConfigError, match="is not a file or a directory"):
        read(snapshot / "pipe")
    # Where there are no records, every text is data.
    notes = tmp_path / "notes"
    notes.mkdir()
    for name in ("README.md", "code.py", "LICENSE"):
        (notes / name).write_text(name)
    (notes / "broken").symlink_to("nothing")
    assert read(notes) == ["LICENSE", "README.md", "code.py"]


NAMES = ["lr[1e-3]", "a\\b", " with spaces ", "#x", "50%", "a,b", "tab\there", "*", "[/red]"]


@pytest.mark.parametrize("name", [*NAMES, os.fsdecode(b"latin \xff")])
def test_a_path_is_taken_as_it_is_before_it_is_a_pattern(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir(parents=True)
    (folder / f"{name}.txt".replace("/", "")).write_text("this one")
    (tmp_path / "other.txt").write_text("another")
    for path in (folder, folder / f"{name}.txt".replace("/", ""), folder / "*.txt"):
        assert read(path) == ["this one"]
        assert read(f"{path}, {tmp_path / 'other.txt'}") == ["this one", "another"]
        if path.name != "*.txt":  # as the command line has names that are no UTF-8
            assert read(os.fsencode(path).decode("latin-1")) == ["this one"]
    (folder / "bad.txt").write_bytes(b"\0")
    report = CorpusReport()
    read(folder, report)
    assert report.lines()[0].isprintable()


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "y/" * 3000, "a\0*", "~nobody-here/x"])
def test_names_that_no_file_can_have_do_not_exist(path):
    with pytest.raises(ConfigError, match=r"^data\.path=.* does not exist"):
        read(path)
    with pytest.raises(ConfigError, match=r"^data\.path=.* does not exist"):
        read("stdlib," + path)


def test_a_wrong_parquet_field_names_the_columns(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="'body'"):
        read(tmp_path / "x.parquet")
    table = pyarrow.table({"text": pyarrow.array([b"\xff\xfe"]).view("string")})
    parquet.write_table(table, tmp_path / "y.parquet")
    with pytest.raises(ConfigError, match=r"not Parquet, .*utf-8"):
        read(tmp_path / "y.parquet")
    (tmp_path / "y.parquet").write_bytes(b"PAR1 nonsense")
    report = CorpusReport()
    with pytest.raises(ConfigError, match="no documents"):
        read(tmp_path / "y.parquet", report)
    assert "not Parquet" in report.lines()[0]


def test_hash_split_covers_everything_once_and_never_divides_equal_texts(tmp_path):
    texts = [f"document {i % 700}" for i in range(1000)]
    path = tmp_path / "x.json"
    path.write_text(json.dumps(texts))
    train = read(path, validation_fraction=0.2)
    held_out = read(path, part="validation", validation_fraction=0.2)
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 0.15 < len(set(held_out)) / 700 < 0.25
    # What is held out at a smaller share stays held out at a larger one.
    assert set(read(path, part="validation", validation_fraction=0.1)) <= set(held_out)
    # Pinned: a change here silently moves training documents into everybody's validation split.
    assert "".join(split_of(str(i), 0.5)[0] for i in range(16)) == "ttvtvtvtttttvtvt"


@pytest.mark.parametrize("fraction", [0.1, 0.05, 0.25])
def test_position_split_cuts_one_file_where_nanogpt_does(tmp_path, fraction):
    text = "".join(f"línea {i}\n" for i in range(997))
    (tmp_path / "input.txt").write_text(text)
    keep = int(len(text) * (1 - fraction))
    settings = {"split": "position", "validation_fraction": fraction}
    assert read(tmp_path, **settings) == [text[:keep]]
    assert read(tmp_path, part="validation", **settings) == [text[keep:]]
    if fraction == 0.1:
        assert keep == int(len(text) * 0.9)


def test_position_split_of_several_documents_cuts_the_corpus_not_each(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(["a" * 6, "b" * 6, "c" * 4, "d" * 4]))
    settings = {"split": "position", "validation_fraction": 0.5}
    assert read(tmp_path, **settings) == ["a" * 6, "b" * 4]
    assert read(tmp_path, part="validation", **settings) == ["b" * 2, "c" * 4, "d" * 4]


def test_fingerprint_follows_content_not_name_or_time(tmp_path):
    sidecar = tmp_path / "hashes.json"
    file = tmp_path / "x.txt"
    file.write_text("one")

    def fingerprint(path):
        return source(str(path), EVERYTHING, 0).fingerprint(sidecar)

    first = fingerprint(file)
    assert fingerprint(file) == first
    file.rename(tmp_path / "y.txt")
    assert fingerprint(tmp_path / "y.txt") == first
    (tmp_path / "y.txt").write_text("two")
    assert fingerprint(tmp_path / "y.txt") != first
    sidecar.write_text("damaged {")
    (tmp_path / "y.txt").write_text("one")
    assert fingerprint(tmp_path / "y.txt") == first


def test_a_corpus_is_known_again_wherever_it_lies_and_however_it_is_read(tmp_path):
    def fingerprint(seed=0, **changes):
        config = dataclasses.replace(EVERYTHING, cache_dir=str(tmp_path / "cache"), **changes)
        return corpus_fingerprint(config, seed)

    for folder, name in (("one", "a.txt"), ("two/deep", "book.v2.txt")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / name).write_text("the same text")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    first = fingerprint(path=one)
    assert first == fingerprint(path=two)
    assert first == fingerprint(path=one + "/a.txt", prefetch=0, num_threads=3, batch_size=5)
    others = [
        fingerprint(path=one, encoding="latin-1"),
        fingerprint(path=one, validation_path=two),
        fingerprint(path=(one, two)),
        fingerprint(path="storyworld"),
        fingerprint(path="storyworld", seed=1),
    ]
    (tmp_path / "two" / "deep" / "book.v2.txt").write_text("another text")
    assert len({first, fingerprint(path=two), *others}) == 7


def test_stdlib_is_large_deterministic_and_free_of_installed_packages():
    report = CorpusReport()
    config = dataclasses.replace(EVERYTHING, path="stdlib")
    texts = list(documents(config, "train", 0, report))
    assert sum(len(text.encode()) for text in texts) > 10e6
    assert any("class OrderedDict" in text for text in texts)
    assert any(text.startswith("sys\n") and "getrefcount" in text for text in texts)
    assert not any("__version__ = '0.10.2'" in text and "jax" in text for text in texts)
    corpus = source("stdlib", config, 0)
    assert corpus.fingerprint() == source("stdlib", config, 1).fingerprint()
    assert all(" at 0x" not in text for text in texts[:700] if text.startswith(("sys\n", "_")))


def test_hugging_face_datasets_are_read_by_name(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    texts = [f"text {i}" for i in range(20)]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "train.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / "saved")
    for name in ("plain", "saved"):
        assert read(f"hf:{tmp_path / name}") == texts
        assert read(f"hf:{tmp_path / name}", num_documents=5) == texts[:5]
    with pytest.raises(ConfigError, match="'text'"):
        read(f"hf:{tmp_path / 'plain'}", text_field="body")
    with pytest.raises(ConfigError, match=r"data\.path='hf:.*/nowhere' cannot be read"):
        read(f"hf:{tmp_path / 'nowhere'}")
