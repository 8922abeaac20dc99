"""Files of every kind that corpora are read from, with something wrong in most of them."""

import gzip
import json
import random


def write_all_kinds(folder, seed=0, pairs=False):
    """Fills `folder`; long .jsonl, .tsv and .parquet files are cut into spans, others are not."""
    pyarrow = __import__("pytest").importorskip("pyarrow")
    parquet = __import__("pyarrow.parquet").parquet
    zstandard = __import__("pytest").importorskip("zstandard")
    rng = random.Random(seed)
    fields = ("source", "target") if pairs else ("text",)

    def text():
        return "".join(rng.choice("abc äé🎈\n ") for _ in range(rng.randint(1, 60)))

    def record():
        return {field: text() for field in fields}

    def line():
        bad = ["", "{bad", "{}", f'{{"{fields[0]}": 3}}', f'{{"{fields[0]}": "\\ud800"}}', "\xff"]
        return json.dumps(record()) if rng.random() < 0.8 else rng.choice(bad)

    def lines(number):
        return "\n".join([json.dumps(record()), *(line() for _ in range(number))])

    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text(lines(60), encoding="latin-1", errors="replace")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines(30).encode()))
    (folder / "c.ndjson").write_text(lines(60).replace("\n", "\r\n") + "\n")
    (folder / "d.json").write_text(json.dumps([record() for _ in range(10)]))
    (folder / "e.jsonl.zst").write_bytes(zstandard.compress(lines(30).encode()))
    records = [record() for _ in range(40)]
    table = pyarrow.table({name: [r[name] for r in records] for name in fields})
    parquet.write_table(table, folder / "f.parquet", row_group_size=7)
    (folder / "g.parquet").write_text("not a table")
    (folder / "h.jsonl").write_bytes(b"")
    (folder / "i.jsonl").write_text(lines(60))
    (folder / "j.txt").write_text("plain text\n" * 20)
    (folder / "k.txt").write_bytes(b"\0binary")
    rows = ["\t".join(("target", "source", "other"))]
    rows += ["\t".join(rng.choice("xyz") * rng.randint(0, 3) for _ in range(3)) for _ in range(60)]
    (folder / "l.tsv").write_text("\n".join([*rows, "only one", "", "y\tz"]))
    return folder


def contents(folder):
    """{relative path: bytes} of everything below `folder`."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
