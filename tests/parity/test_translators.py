"""Translations are those of transformers, from directories that it saved with their tokenizers."""

import io
import json
import shutil

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import sentencepiece  # noqa: E402
import tiny_jobs  # noqa: E402
from test_main import main  # noqa: E402

import lm  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

ENGLISH = [
    "The old cat sat on the mat, and a dog ran home.",
    "A cat is not a dog.",
    "Red foxes dance near the river when the moon is high.",
]
FRENCH = [
    "Le vieux chat est assis sur le tapis, et un chien rentre.",
    "Un chat n’est pas un chien.",
    "Des renards roux dansent près de la rivière.",
]
SIZES = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40,
    "max_position_embeddings": 64, "scale_embedding": True, "forced_eos_token_id": None,
}  # fmt: skip


def pieces(texts, size=90):
    data = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20), model_writer=data, vocab_size=size, minloglevel=3,
        hard_vocab_limit=False,
    )  # fmt: skip
    return data.getvalue()


def names(data):
    processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    return [processor.id_to_piece(id) for id in range(3, processor.get_piece_size())]


def saved(directory, model, tokenizer, **generation):
    """A random model and its tokenizer, as transformers saves them."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.3 * torch.randn(parameter.shape, generator=generator)
                is_scale = parameter.dim() == 1 and name.endswith("weight")
                parameter.copy_(1 + noise if is_scale else noise)
    model.generation_config = transformers.GenerationConfig(**generation)
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return model


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """Padding starts the decoder, is likely, and may not be written."""
    scratch, directory = (tmp_path_factory.mktemp(name) for name in ("files", "marian"))
    spm = {"source.spm": pieces(ENGLISH), "target.spm": pieces(FRENCH)}
    for name, data in spm.items():
        (scratch / name).write_bytes(data)
    known = ["</s>", "<unk>", *names(spm["source.spm"])[4:], *names(spm["target.spm"])]
    known += ["漢", ">>fra<<", ">>deu<<"]
    vocabulary = {name: id for id, name in enumerate([*dict.fromkeys(known), "<pad>"])}
    (scratch / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    paths = [str(scratch / name) for name in (*spm, "vocab.json")]
    tokenizer = transformers.MarianTokenizer(*paths, source_lang="en", target_lang="fr")
    pad = len(vocabulary) - 1
    ends = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0}
    config = transformers.MarianConfig(
        **SIZES, **ends, vocab_size=pad + 1, activation_function="swish"
    )
    model = transformers.MarianMTModel(config)
    model.final_logits_bias[0, pad] = 9.0
    return directory, saved(directory, model, tokenizer, **ends, bad_words_ids=[[pad]])


@pytest.fixture(scope="module", params=["50", ""])
def mbart(request, tmp_path_factory):
    """mBART-50, and the first, whose languages stand behind the source."""
    scratch, directory = (tmp_path_factory.mktemp(name) for name in ("files", "mbart"))
    (scratch / "sentencepiece.bpe.model").write_bytes(pieces(ENGLISH + FRENCH))
    kind = getattr(transformers, f"MBart{request.param}Tokenizer")
    tokenizer = kind.from_pretrained(scratch, src_lang="fr_XX", tgt_lang="ro_RO")
    ends = {"pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0, "decoder_start_token_id": 2}
    if not request.param:
        ends["decoder_start_token_id"] = tokenizer.convert_tokens_to_ids("ro_RO")
    config = transformers.MBartConfig(**SIZES, **ends, vocab_size=len(tokenizer))
    model = transformers.MBartForConditionalGeneration(config)
    return directory, saved(directory, model, tokenizer, **ends), scratch, request.param


def translated(model, ids, beams, **settings):
    out = model.generate(
        input_ids=torch.tensor([ids]), num_beams=beams, do_sample=False, max_new_tokens=16,
        no_repeat_ngram_size=2, max_length=None, **settings,
    )  # fmt: skip
    return out[0].tolist()


def ours(run, text, beams, new=16, **languages):
    return run.generate(
        text,
        temperature=0,
        num_beams=beams,
        max_new_tokens=new,
        no_repeat_ngram_size=2,
        **languages,
    )


TEXTS = [*ENGLISH, "  two  spaces ", "", "漢字 The cat", ">>fra<< A cat", ">>xyz<<A cat", "½ ﬁ é ▁"]


def test_marian_reads_and_writes_the_tokens_of_transformers(marian):
    directory, _ = marian
    tokenizer, run = transformers.AutoTokenizer.from_pretrained(directory), lm.load(directory)
    for text in TEXTS:
        assert run.encode(text) == tokenizer(text)["input_ids"], text
    for text in [*FRENCH, "Le chat 漢"]:
        ids = tokenizer(text_target=text)["input_ids"]
        assert [*run.tokenizer.target.encode(text), 0] == ids
        assert run.tokenizer.decode(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert run.between(target="deu").encode("A cat") == tokenizer(">>deu<<A cat")["input_ids"]


@pytest.mark.parametrize("beams", [1, 4])
def test_marian_translates_as_transformers_does(marian, beams):
    directory, model = marian
    tokenizer, run = transformers.AutoTokenizer.from_pretrained(directory), lm.load(directory)
    for text in ENGLISH[:2]:
        ids = translated(model, tokenizer(text)["input_ids"], beams)
        assert tokenizer.pad_token_id not in ids[1:] and len(set(ids)) > 5
        found = ours(run, text, beams).strip()  # as transformers does
        assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_mbart_reads_the_tokens_of_transformers(mbart):
    directory, _, scratch, _ = mbart
    tokenizer, run = transformers.AutoTokenizer.from_pretrained(directory), lm.load(directory)
    pieces_alone = scratch / "pieces"
    shutil.copytree(directory, pieces_alone)
    (pieces_alone / "tokenizer.json").unlink()
    shutil.copy(scratch / "sentencepiece.bpe.model", pieces_alone)
    other = lm.load(pieces_alone)
    for text in [*ENGLISH, *FRENCH, "  two  spaces", "漢字 The cat"]:
        ids = tokenizer(text)["input_ids"]
        assert run.encode(text) == other.encode(text) == ids, text
        assert run.tokenizer.decode(ids) == other.tokenizer.decode(ids)
    tokenizer.src_lang = "cs_CZ"
    ids = tokenizer("A cat")["input_ids"]
    assert run.between("cs_CZ").encode("A cat") == other.between("cs_CZ").encode("A cat") == ids


@pytest.mark.parametrize("beams", [1, 4])
def test_mbart_translates_as_transformers_does(mbart, beams):
    directory, model, _, kind = mbart
    tokenizer, run = transformers.AutoTokenizer.from_pretrained(directory), lm.load(directory)
    target = tokenizer.convert_tokens_to_ids("de_DE")
    forced = {"forced_bos_token_id" if kind else "decoder_start_token_id": target}
    for text in FRENCH[:2]:
        ids = translated(model, tokenizer(text)["input_ids"], beams, **forced)
        assert len(set(ids)) > 5
        # The language that it must begin with is one of transformers' new tokens.
        found = ours(run, text, beams, 15 if kind else 16, target_language="de_DE")
        assert found == tokenizer.decode(ids, skip_special_tokens=True)


def test_what_a_user_types_translates(mbart):
    directory, model, _, kind = mbart
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, src_lang="en_XX")
    target = tokenizer.convert_tokens_to_ids("de_DE")
    forced = {"forced_bos_token_id" if kind else "decoder_start_token_id": target}
    ids = translated(model, tokenizer(ENGLISH[1])["input_ids"], 1, **forced)
    code, output, errors = main(
        "--config=configs/generate.py",
        f"--config.init_from={directory}",
        f"--config.prompt={ENGLISH[1]}",
        "--config.source_language=en_XX",
        "--config.target_language=de_DE",
        "--config.temperature=0",
        f"--config.max_new_tokens={15 if kind else 16}",
        "--config.no_repeat_ngram_size=2",
    )
    assert code == 0, errors
    assert output == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("target_language", ["", "de_DE"])
def test_mbart_is_tuned_on_pairs_of_its_languages(mbart, target_language, tmp_path):
    directory, model, _, kind = mbart
    pairs = "".join(f"{source}\t{target}\n" for source, target in zip(FRENCH, ENGLISH))
    (tmp_path / "pairs.tsv").write_text(pairs, encoding="utf-8")
    code, _, errors = main(
        "--config=configs/finetune.py",
        f"--workdir={tmp_path / 'tuned'}",
        f"--config.init_from={directory}",
        f"--config.data.path={tmp_path / 'pairs.tsv'}",
        f"--config.data.cache_dir={tmp_path / 'tokens'}",
        f"--config.target_language={target_language}",
        "--config.objective.name=seq2seq",
        "--config.data.text_field=source",
        "--config.data.text_field=target",
        "--config.data.validation_fraction=0.0",
        "--config.data.block_size=64",
        "--config.data.batch_size=3",
        "--config.data.packing=none",
        "--config.model.compute_dtype=float32",
        "--config.model.dropout=0.0",
        "--config.train.steps=1",
        "--config.train.log_every=1",
    )
    assert code == 0, errors
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    language = tokenizer.convert_tokens_to_ids(target_language or "ro_RO")
    total = count = 0
    for source, target in zip(FRENCH, ENGLISH):
        words = [*tokenizer(target, add_special_tokens=False)["input_ids"], 2]
        labels = [language, *words] if kind else words
        read = [2 if kind else language, *labels[:-1]]
        with torch.no_grad():
            loss = model(
                input_ids=torch.tensor([tokenizer(source)["input_ids"]]),
                decoder_input_ids=torch.tensor([read]),
                labels=torch.tensor([labels]),
            ).loss.item()
        total, count = total + loss * len(labels), count + len(labels)
    ((_, first),) = tiny_jobs.losses(tmp_path / "tuned")
    assert first == pytest.approx(total / count, abs=1e-5)
    tuned, original = lm.load(tmp_path / "tuned"), lm.load(directory)
    between = original.between(target=target_language)
    assert tuned.framing.decoder_start == between.framing.decoder_start
    assert tuned.encode("Un chat") == original.encode("Un chat")
