"""What a grammar lets pass is in its language, and what ends is whole."""

import json
import re

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
from tiny_run import write_tiny_run

import lm
from lm import __main__ as main
from lm.config import ConfigError
from lm.inference import SamplingConfig
from lm.inference.engine import Engine, EngineConfig
from lm.inference.grammar import FIELDS, Grammars
from lm.inference.requests import Request
from lm.inference.sampling import sample, warping
from lm.tokenizers import TokenizerConfig, train

pytest.importorskip("llguidance")

TEXT = 'the cat "sat" on {"a": 1, "b": [true, null]} and 12.5 mats at 2020-01-01, é 漢 🙂. ' * 20


@pytest.fixture(scope="module")
def tokenizer():
    return train(TokenizerConfig(kind="bpe", vocab_size=400), [TEXT])


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, [tokenizer.eos_id])


def object_of(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required)}


INT, BOOL, NULL = {"type": "integer"}, {"type": "boolean"}, {"type": "null"}
WORD = {"type": "string", "maxLength": 8}
PAIR = {"type": "array", "items": INT, "minItems": 2, "maxItems": 2}
CLOSED = {"additionalProperties": False}
TREE = {
    "$defs": {"node": {
        "type": "object", "required": ["v", "c"], **CLOSED,
        "properties": {
            "v": BOOL, "c": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/node"}}
        },
    }},
    "$ref": "#/$defs/node",
}  # fmt: skip
SCHEMAS = [
    INT, BOOL, NULL, WORD, {"type": "number"}, {"type": "string"}, {"type": "object"}, {},
    {"type": "array"}, {"type": ["integer", "null"]}, {"const": "yes"}, {"const": {"a": [1, None]}},
    {"enum": ["red", "green", 3, None, [1], {"k": "é"}]}, {"type": "integer", "minimum": 10},
    {"type": "integer", "minimum": -7, "maximum": 12}, {"type": "integer", "exclusiveMaximum": 0},
    {"type": "number", "minimum": 0.25, "maximum": 0.75}, {"type": "integer", "multipleOf": 5},
    {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
    {"type": "string", "minLength": 3, "maxLength": 5}, {"type": "string", "pattern": "^[ab]+c$"},
    {"type": "string", "pattern": "^\\d{3}-\\d{4}$"}, {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"}, {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "time"}, {"type": "string", "format": "date-time"},
    {"type": "array", "items": INT, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3},
    {"type": "array", "prefixItems": [BOOL, NULL], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [INT], "items": WORD, "maxItems": 3},
    {"type": "array", "items": {"type": "array", "items": BOOL, "maxItems": 2}, "maxItems": 2},
    object_of(a=INT), object_of(["a"], a=INT), {**object_of(["a", "b"], a=WORD, b=BOOL), **CLOSED},
    {**object_of(["ключ", "quo\"te"], **{"ключ": BOOL, "quo\"te": NULL}), **CLOSED},
    {**object_of(a=BOOL, b=BOOL, c=NULL), **CLOSED}, {**object_of(), **CLOSED},
    object_of(["n"], n={**object_of(["m"], m={**object_of(["k"], k=INT), **CLOSED}), **CLOSED}),
    {"type": "object", "additionalProperties": INT}, {"anyOf": [INT, WORD]},
    {"anyOf": [{**object_of(["a"], a=INT), **CLOSED}, {**object_of(["b"], b=WORD), **CLOSED}]},
    {"oneOf": [{"type": "integer", "maximum": 3}, {"type": "boolean"}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 40}]},
    {"$defs": {"p": {"type": "string", "pattern": "^[A-Z]{2}$"}},
     "type": "array", "items": {"$ref": "#/$defs/p"}, "minItems": 1, "maxItems": 3},
    TREE, {**object_of(["kind", "at"], kind={"const": "point"}, at=PAIR), **CLOSED},
    {**object_of(["t"], t={"anyOf": [NULL, {"enum": ["on", "off"]}]}), **CLOSED},
    {"type": "object", "properties": {"a": INT}, "patternProperties": {"^x_": BOOL}, **CLOSED},
    {"type": ["string", "array"], "maxLength": 3, "items": NULL, "maxItems": 2},
]  # fmt: skip


def written(tokenizer, grammars, masks, steps=160, seed=0):
    """What a random model of pairs of tokens writes under each grammar: ids, and whether it ended.

    Of what JSON is made of it is fond, so that texts come to an end.
    """
    V, B = tokenizer.vocab_size, len(masks)
    rng = np.random.default_rng(seed)
    table_VV = rng.normal(0, 1.5, (V, V)).astype(np.float32)
    for id in range(V):
        data = tokenizer.token_bytes(id)
        table_VV[:, id] += 4 * (len(data) == 1 and data in b'"]},:') + 5 * (id == tokenizer.eos_id)
    config = SamplingConfig(allowed_ids=(0,))
    values, kind = warping([config] * B, V, [tokenizer.eos_id])
    step = jax.jit(sample, static_argnames="kind")
    texts, ended, token_B = [[] for _ in masks], [False] * B, np.zeros(B, np.int32)
    for count in range(steps):
        for row, grammar in enumerate(masks):
            values.allowed_BW[row] = grammar.mask() if not ended[row] else 1
        keys_B = jax.random.split(jax.random.fold_in(jax.random.key(seed), count), B)
        count_B = jnp.full(B, count)
        drawn = step(table_VV[token_B], keys_B, values, kind=kind, count_B=count_B)
        token_B = np.asarray(drawn.token_B)
        for row, id in enumerate(token_B.tolist()):
            if not ended[row]:
                ended[row] = id == tokenizer.eos_id
                if not ended[row]:
                    texts[row].append(id)
                    masks[row].advance(id)
        if all(ended):
            break
    assert not any(grammar.error for grammar in masks)
    return texts, ended


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_every_text_that_ends_meets_its_schema(tokenizer, grammars, seed):
    assert len(SCHEMAS) == 50
    masks = [grammars.compile("json", schema).start() for schema in SCHEMAS]
    texts, ended = written(tokenizer, grammars, masks, seed=seed)
    for schema, ids in zip(SCHEMAS, texts):
        text = tokenizer.decode(ids)
        assert not re.search(r"[ \n]{17}", text)
        if ended[SCHEMAS.index(schema)]:
            jsonschema.validate(json.loads(text), schema)
    assert sum(ended) >= 44


def test_expressions_and_grammars_hold_whole_texts(tokenizer, grammars):
    expressions = [r"[a-z]{2,5}é?", r"(cat|漢🙂)+!", r"\d{4}-\d\d", r"(yes|no)", r"a{0,3}"]
    lark = 'start: "<" (start | /[0-9]{1,2}/) ">"'
    masks = [grammars.compile("regex", e).start() for e in expressions]
    masks += [grammars.compile("lark", lark).start() for _ in range(5)]
    texts, ended = written(tokenizer, grammars, masks)
    texts = [tokenizer.decode(ids) for ids in texts]
    for expression, text, end in zip(expressions, texts, ended):
        assert not end or re.fullmatch(expression, text)
    for text, end in zip(texts[5:], ended[5:]):
        depth = text.count("<")
        assert not end or re.fullmatch("<" * depth + "[0-9]{1,2}" + ">" * depth, text)
    assert sum(ended) >= 8


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer):
    directory = tmp_path_factory.mktemp("run")
    write_tiny_run(directory, tokenizer=tokenizer, vocab_size=tokenizer.vocab_size + 7)
    return lm.load(directory)


def test_a_run_keeps_to_them(run):
    texts = run.generate(["a", "the cat "], regex="(yes|no|)!", num_samples=3, max_new_tokens=9)
    for prompt, text in zip(["a"] * 3 + ["the cat "] * 3, texts):
        assert text.removeprefix(prompt) in ("yes!", "no!", "!")
    assert run.generate("a", grammar='start: "x" "y"~3', temperature=0) == "axyyy"
    with pytest.raises(ConfigError, match="one of json_schema, regex and grammar"):
        run.generate("a", regex="a", grammar='start: "a"')
    with pytest.raises(ConfigError, match="num_beams=2 does not go with a json_schema, regex"):
        run.generate("a", regex="a", num_beams=2)
    with pytest.raises(ConfigError, match="regex cannot be used: unclosed group"):
        run.generate("a", regex="(a")


def test_the_command_line_keeps_to_them(run, capsys):
    def printed(*words):
        command = ["--config=configs/generate.py", f"--config.init_from={run.directory}", *words]
        code = main.guarded(main.run, [*command, "--config.prompt=a"])
        return code, capsys.readouterr()

    code, said = printed("--config.regex=(yes|no)!", "--config.num_samples=2")
    assert code == 0 and len(re.findall(r"^a(?:yes|no)!$", said.out, re.MULTILINE)) == 2
    code, said = printed('--config.json_schema={"enum": [12]}')
    assert (code, said.out) == (0, "a12\n")
    code, said = printed("--config.json_schema={")
    assert code == 2 and "json_schema is no JSON" in said.err


def test_what_a_run_ends_meets_the_schema_also_past_its_context(run):
    schema = {"type": "array", "items": {"enum": ["one", "two", 3]}, "minItems": 9, "maxItems": 12}
    grammar = run.generator.grammars.compile("json", schema)
    settings = SamplingConfig(num_samples=6, max_new_tokens=150)
    generation = run.generator.generate([run.encode("a")], settings, grammar=grammar)
    texts = [""] * 6
    for row, text in generation.texts():
        texts[row] += text
    for text, ended in zip(texts, generation.ended):
        if ended:
            jsonschema.validate(json.loads(text), schema)
    assert sum(generation.ended) >= 3 and any("outgrew" in each for each in generation.notices)


@pytest.mark.slow
def test_every_reply_of_the_engine_that_stops_meets_its_schema(run):
    writer, tokenizer = run.generator, run.tokenizer
    engine = Engine(run.skeleton, run.params, run.framing, tokenizer, EngineConfig(max_slots=16))
    fond = {id: 8.0 for data in '"]},:' for id in tokenizer.encode(data)}
    settings = SamplingConfig(max_new_tokens=120, logit_bias={**fond, tokenizer.eos_id: 9.0})
    ids = tuple(run.encode("a"))
    numbers = {}
    for schema in SCHEMAS:
        grammar = writer.grammars.compile("json", schema)
        for sample_of in range(2):  # which share a grammar
            request = Request(ids, settings, sample=sample_of, grammar=grammar)
            numbers[engine.submit(request)] = schema
    texts, finish = {number: [] for number in numbers}, {}
    while not engine.idle:
        for event in engine.step():
            texts[event.number] += [step.id for step in event.steps]
            finish[event.number] = event.finish
    for number, schema in numbers.items():
        if finish[number] == "stop":
            jsonschema.validate(json.loads(tokenizer.decode(texts[number])), schema)
    assert list(finish.values()).count("stop") >= 80


def bits(mask_W):
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little")).tolist()


def test_end_of_text_comes_where_a_text_may_end_and_alone_where_it_must(tokenizer, grammars):
    grammar = grammars.compile("regex", "aa?")
    (a,) = tokenizer.encode("a")
    first, second = grammar.start(), grammar.start()
    assert bits(first.mask()) == [a] and not first.complete
    first.advance(a)
    assert bits(first.mask()) == [a, tokenizer.eos_id] and first.complete and not first.ended
    first.advance(a)
    assert bits(first.mask()) == [tokenizer.eos_id] and first.ended and first.complete
    assert bits(second.mask()) == [a]  # and another text is where it was


def test_without_end_of_text_the_grammar_ends_the_text(tokenizer):
    grammar = Grammars(tokenizer, ()).compile("regex", "aa?").start()
    (a,) = tokenizer.encode("a")
    for _ in range(2):
        assert bits(grammar.mask()) == [a]
        grammar.advance(a)
    assert grammar.ended and bits(grammar.mask()) == []


@pytest.mark.parametrize("kind, size", [("byte", 300), ("char", 300), ("bpe", 288)])
def test_every_kind_of_vocabulary_can_be_constrained(kind, size):
    tokenizer = train(TokenizerConfig(kind=kind, vocab_size=size), [TEXT])
    grammar = Grammars(tokenizer, [tokenizer.eos_id]).compile("regex", "é[ab]").start()
    for id in tokenizer.encode("éa"):
        assert id in bits(grammar.mask())
        grammar.advance(id)
    assert bits(grammar.mask()) == [tokenizer.eos_id]


BAD = [
    ("json", "{", "is no JSON: EOF while parsing"), ("json", "[1]", "is no JSON: Expecting object"),
    ("json", {"type": "bogus"}, "cannot be used: Invalid type: bogus"),
    ("json", {"not": {}}, 'cannot be used: Unimplemented keys: ["not"]'),
    ("json", {"$ref": "#"}, "cannot be used: no text meets it"),
    ("json", {"$ref": "http://x.y/z"}, "cannot be used: Resource 'http://x.y/z' is not present"),
    ("json", {"pattern": "[", "type": "string"}, "cannot be used: unclosed character class"),
    ("json", {"minimum": float("nan")}, "is no JSON"), ("json", {"a": "x" * 70_000}, "has 70,0"),
    ("json", 3, "='3' must be text"), ("json", {"minLength": -1}, "cannot be used: Expected pos"),
    ("json", '{"items":' * 5000 + "{}" + "}" * 5000, "is no JSON: recursion limit exceeded"),
    ("regex", "[", "cannot be used: unclosed character class"),
    ("regex", "(?=a)b", "cannot be used: look-around"), ("regex", "(" * 30_000, "cannot be used"),
    ("regex", "a{2000000000}", "repeats something {2000000000} times"),
    ("regex", "x" * 70_000, "has 70,000 bytes: it may have 65,536"),
    ("lark", "", "cannot be used: Empty grammar"), ("lark", "start: x", "cannot be used: at 1(8)"),
    ("lark", "start: " + "(" * 9999, "cannot be used: 1("),
]  # fmt: skip


@pytest.mark.parametrize("kind, source, message", BAD, ids=lambda of: str(of)[:30])
def test_what_cannot_be_used_is_told_in_one_line(grammars, kind, source, message):
    with pytest.raises(ConfigError) as error:
        grammars.compile(kind, source)
    text = str(error.value)
    assert text.startswith(f"{FIELDS[kind]}") and message in text and len(text) < 400
    assert "\n" not in text


@pytest.mark.parametrize(
    "kind, source",
    [
        ("regex", "(.*a){30}.{30}"), ("regex", "(x+x+)+y"), ("regex", "((a{1,999}){1,999}){1,999}"),
        ("regex", ".*.*.*=.*" * 50), ("json", {"type": "string", "maxLength": 10**9}),
        ("json", {"type": "array", "minItems": 10**9}), ("lark", "start: start start | \n"),
        ("lark", "start: " + " | ".join(f'"a{i}"' for i in range(5000))),
    ],
    ids=lambda of: str(of)[:30],
)  # fmt: skip
def test_what_would_explode_elsewhere_goes_on_or_says_that_it_cannot(
    tokenizer, grammars, kind, source
):
    try:
        grammar = grammars.compile(kind, source).start()
    except ConfigError:
        return
    rng = np.random.default_rng(0)
    for _ in range(40):
        allowed = bits(grammar.mask())
        if grammar.ended:
            break
        grammar.advance(int(rng.choice(allowed)))
    assert "\n" not in grammar.error
