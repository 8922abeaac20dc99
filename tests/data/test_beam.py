"""The same on Apache Beam itself; what it is given to do is tested in test_large.py."""

import dataclasses
import pathlib
import sys

import pytest
from corpus_files import contents, write_all_kinds

from lm import tokenizers
from lm.config import ConfigError, defaults, view
from lm.data import beam, large, prepare
from lm.data.beam import BeamConfig
from lm.data.config import DataConfig
from lm.jobs import corpus as job
from lm.tokenizers import TokenizerConfig

REASON = "needs Apache Beam: pip install 'lm[beam]'"


@pytest.fixture
def apache_beam():
    return pytest.importorskip("apache_beam", reason=REASON)


def entries(folder):
    found = contents(pathlib.Path(folder))
    return {k: v for k, v in found.items() if not k.startswith(("locks/", "hashes.json"))}


def compared(tmp_path, workers):
    config = DataConfig(
        path=str(write_all_kinds(tmp_path / "files")),
        validation_fraction=0.3,
        cache_dir=str(tmp_path / "one"),
    )
    tokenizer = tokenizers.train(
        TokenizerConfig(kind="bpe", vocab_size=300), ["some text to train on"]
    )
    prepare(config, tokenizer, 0, lambda line: None)
    many = dataclasses.replace(config, cache_dir=str(tmp_path / "many"))
    settings = BeamConfig(workers=workers, part_bytes=1500)
    large.prepare(many, tokenizer, 0, settings, lambda line: None)
    return entries(tmp_path / "one"), entries(tmp_path / "many")


def test_one_worker_writes_the_same_bytes_as_one_process(tmp_path, apache_beam, monkeypatch):
    monkeypatch.setattr(large, "_SMALL", 0)  # it recognises and copies files, too
    one, many = compared(tmp_path, workers=1)
    assert one == many and len(one) == 5


@pytest.mark.slow
def test_several_workers_write_the_same_bytes_as_one_process(tmp_path, apache_beam):
    one, many = compared(tmp_path, workers=2)
    assert one == many and len(one) == 5


def fails(task):
    raise RuntimeError(f"task {task} cannot be done")


def test_a_failed_pipeline_is_one_line_that_says_how_to_go_on(tmp_path, apache_beam):
    folder = str(tmp_path / "tasks")
    with pytest.raises(ConfigError, match=r"runner='DirectRunner' failed: .*cannot be done") as e:
        beam.each(fails, [1, 2], folder, BeamConfig(workers=1))
    assert "\n" not in str(e.value) and f"go on with what is in {folder}" in str(e.value)
    assert beam.each(abs, [-1, -2], folder + "2", BeamConfig(workers=1)) == [1, 2]


@pytest.mark.parametrize(
    "planted",
    [
        b"cos\nsystem\n(S'touch HERE'\ntR.",  # the classic
        b"clm.data.storage\nwrite_bytes\n(S'HERE'\nC\x00tR.",  # a function of ours
        b"clm.data.storage\nos.system\n(S'touch HERE'\ntR.",
        b"not a pickle",
    ],
)
def test_a_planted_result_is_not_run(planted, tmp_path):
    touched, folder = tmp_path / "touched", tmp_path / "tasks"
    folder.mkdir()
    (folder / "0.done").write_bytes(planted.replace(b"HERE", str(touched).encode()))
    with pytest.raises(ConfigError, match="is no result of this job"):
        beam.each(abs, [-1], str(folder), BeamConfig())
    assert not touched.exists()


def test_an_unknown_runner_is_one_line(apache_beam):
    with pytest.raises(ConfigError, match=r"config\.beam\.runner='NoSuchRunner' cannot be used"):
        beam.check_runner(BeamConfig(runner="NoSuchRunner"))


def test_without_apache_beam_the_job_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm\[beam\]'"):
        job.run(defaults(job.CorpusJob), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_options_reach_the_runner():
    options = "--project=p --region='a b'"
    assert BeamConfig(runner="DataflowRunner", options=options).arguments()[:3] == [
        "--runner=DataflowRunner",
        "--project=p",
        "--region=a b",
    ]
    assert "--direct_num_workers=3" in BeamConfig(workers=3).arguments()
    for wrong, message in (
        ({"options": "project=p"}, r"options='project=p' has 'project=p': write --NAME=VALUE"),
        ({"options": "--a='"}, r"options=.* No closing quotation"),
        ({"workers": -1}, r"workers=-1 must be at least 0"),
        ({"part_bytes": 0}, r"part_bytes=0 must be at least 1"),
        ({"runner": ""}, r"runner='' must name a runner"),
    ):
        config = defaults(BeamConfig)
        config.update(wrong)
        with pytest.raises(ConfigError, match=message):
            view(BeamConfig, config, "config.beam")


def test_the_job_makes_what_training_with_its_tokenizer_finds(tmp_path, apache_beam, capsys):
    config = defaults(job.CorpusJob)
    config.data.path = str(write_all_kinds(tmp_path / "files"))
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.validation_fraction = 0.3
    config.tokenizer.kind = "char"
    config.beam.workers = 1
    (made,) = job.run(config, str(tmp_path / "run"))
    assert "token cache" in capsys.readouterr().out
    notes = []
    tokenizer = tokenizers.load(tmp_path / "run" / "tokenizer")
    train, _ = prepare(view(DataConfig, config.data), tokenizer, 0, notes.append)
    assert not notes and train[0].num_tokens == made.splits["train"]["num_tokens"]
    job.run(config, str(tmp_path / "run"))
    assert "tokenising" not in capsys.readouterr().out
    config.tokenizer.kind = "byte"
    with pytest.raises(ConfigError, match=r"--workdir=.*tokenizer\.kind='char'"):
        job.run(config, str(tmp_path / "run"))
