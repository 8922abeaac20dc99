"""Models of transformers with an encoder, small, odd and random, and what they compute."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from family_checks import IGNORED

VOCAB = 97
_SHIFTED = ("T5", "MT5", "Bart", "MBart", "Marian")  # encoder-decoders
ROTARY = ("ModernBert", "Gemma3Text")  # what place they begin at is nothing to them
KINDS = ("Bert", "Roberta", "DistilBert", *ROTARY, *_SHIFTED)


@dataclasses.dataclass(frozen=True)
class Case:
    """A class of transformers and the config to make one of.

    Attributes:
      model: its name.
      config: fields of its config.
      spread: of the weights; so that no activation is far from 1.
      change: what to do to the random model.
    """

    model: str
    config: Mapping[str, Any]
    spread: float = 0.25
    change: Callable[[Any], None] = lambda model: None

    @property
    def kind(self) -> str:
        """What the names of the model and of its config begin with."""
        return next(k for k in KINDS if self.model.startswith(k))


_ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 21, "num_hidden_layers": 3, "num_attention_heads": 3,
    "intermediate_size": 37, "max_position_embeddings": 19, "num_labels": 5,
}  # fmt: skip
_DISTIL = {
    "vocab_size": VOCAB, "dim": 21, "n_layers": 3, "n_heads": 3, "hidden_dim": 37,
    "max_position_embeddings": 19, "num_labels": 5,
}  # fmt: skip
_UNTIED = {"tie_word_embeddings": False}
GEMMA = {
    "vocab_size": VOCAB, "hidden_size": 22, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 10, "intermediate_size": 37, "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "max_position_embeddings": 19, "query_pre_attn_scalar": 11, "use_bidirectional_attention": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "attn_implementation": "eager",
}  # fmt: skip
MODERN = {
    "vocab_size": VOCAB, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3,
    "intermediate_size": 19, "max_position_embeddings": 19, "local_attention": 6, "num_labels": 5,
    "pad_token_id": 0, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "attn_implementation": "eager",
}  # fmt: skip
_BIASED = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
_T5 = {
    "vocab_size": VOCAB, "d_model": 19, "d_kv": 5, "num_heads": 3, "d_ff": 33, "num_layers": 3,
    "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 9, "decoder_start_token_id": 0,
}  # fmt: skip
_BART = {
    "vocab_size": VOCAB, "d_model": 21, "encoder_layers": 3, "decoder_layers": 2,
    "encoder_attention_heads": 3, "decoder_attention_heads": 3, "encoder_ffn_dim": 37,
    "decoder_ffn_dim": 37, "max_position_embeddings": 23, "forced_eos_token_id": None,
}  # fmt: skip
_MARIAN = {
    **_BART, "d_model": 22, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "scale_embedding": True, "activation_function": "swish", "pad_token_id": 1,
    "decoder_start_token_id": 1,
}  # fmt: skip
_V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}


def untie(model) -> None:
    weights = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(7))
    model.lm_head.weight = torch.nn.Parameter(weights * 0.2)


def one_bias(model) -> None:
    """Of an untied head the bias that is read, and the other one which is not."""
    head = model.cls.predictions if hasattr(model, "cls") else model.lm_head
    head.bias.copy_(head.decoder.bias)


def restless(model) -> None:
    """Makes what is generated depend on positions and source, not on the last token alone."""
    factors = {
        "shared": 0.2,
        "final_logits_bias": 0.02,
        "layer_norm.bias": 0.1,
        "embed_positions": 8,
        "relative_attention_bias": 8,
    }
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        for part, factor in factors.items():
            if part in name and (tensor.requires_grad or part != "embed_positions"):
                tensor *= factor


def biased(model) -> None:
    bias = torch.randn(model.final_logits_bias.shape, generator=torch.Generator().manual_seed(8))
    model.final_logits_bias.copy_(bias)


CASES = {
    "bert": Case("BertModel", _ENCODER),
    "bert_masked": Case("BertForMaskedLM", _ENCODER),
    "bert_pretraining": Case("BertForPreTraining", _ENCODER),
    "bert_sequence": Case("BertForSequenceClassification", _ENCODER),
    "bert_token": Case("BertForTokenClassification", _ENCODER),
    "roberta": Case("RobertaModel", _ENCODER),
    "roberta_masked": Case("RobertaForMaskedLM", {**_ENCODER, "type_vocab_size": 1}),
    "roberta_sequence": Case("RobertaForSequenceClassification", _ENCODER),
    "roberta_token": Case("RobertaForTokenClassification", _ENCODER),
    "bert_untied": Case(
        "BertForMaskedLM", {**_ENCODER, **_UNTIED, "hidden_act": "gelu_new"}, change=one_bias
    ),
    "roberta_untied": Case("RobertaForMaskedLM", _ENCODER | _UNTIED, change=one_bias),
    "distilbert": Case("DistilBertModel", _DISTIL),
    "distilbert_masked": Case("DistilBertForMaskedLM", _DISTIL | {"activation": "relu"}),
    "distilbert_untied": Case("DistilBertForMaskedLM", _DISTIL | _UNTIED),
    "distilbert_sequence": Case(
        "DistilBertForSequenceClassification", {**_DISTIL, "sinusoidal_pos_embds": True}
    ),
    "distilbert_token": Case("DistilBertForTokenClassification", _DISTIL),
    "modernbert": Case("ModernBertModel", MODERN, 0.2),
    "modernbert_masked": Case("ModernBertForMaskedLM", MODERN, 0.2),
    "modernbert_biased": Case(
        "ModernBertForMaskedLM",
        {
            **MODERN,
            **_UNTIED,
            **_BIASED,
            "decoder_bias": False,
            "hidden_activation": "relu",
            "classifier_activation": "relu",
        },
    ),
    "modernbert_sequence": Case(
        "ModernBertForSequenceClassification", {**MODERN, "classifier_pooling": "mean"}
    ),
    "modernbert_token": Case("ModernBertForTokenClassification", MODERN),
    "embedding_gemma": Case("Gemma3TextModel", GEMMA, 0.2),
    "t5": Case("T5ForConditionalGeneration", _T5, 0.2),
    # Gated layers multiply rounding errors, too: with 0.2 float32 is 1e-5 away from float64.
    "t5_v1_1": Case("T5ForConditionalGeneration", {**_T5, **_V1_1}, 0.15, untie),
    "t5_encoder": Case("T5EncoderModel", _T5, 0.2),
    "mt5": Case(
        "MT5ForConditionalGeneration",
        {**_T5, "feed_forward_proj": "gated-gelu_python"},
        0.15,
        untie,
    ),
    "bart": Case("BartForConditionalGeneration", _BART),
    "bart_scaled": Case(
        "BartForConditionalGeneration",
        {**_BART, "scale_embedding": True, "activation_function": "relu"},
        change=biased,
    ),
    "bart_body": Case("BartModel", _BART),
    "mbart": Case(
        "MBartForConditionalGeneration",
        {**_BART, "scale_embedding": True, "activation_function": "relu"},
    ),
    "marian": Case("MarianMTModel", _MARIAN, change=biased),
}


def build(case: Case | str, seed: int = 0):
    """The random model of a case, or of its name: every parameter is in general position."""
    case = CASES[case] if isinstance(case, str) else case
    config = getattr(transformers, f"{case.kind}Config")(**case.config)
    model = getattr(transformers, case.model)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # Marian's sinusoids
                continue
            noise = case.spread * torch.randn(parameter.shape, generator=generator)
            # Gemma's are stored less one.
            norm = parameter.dim() == 1 and name.endswith("weight") and case.kind != "Gemma3Text"
            parameter.copy_(1 + noise if norm else noise)
        case.change(model)
    return model.eval()


def random_batch(case: Case | str, seed: int = 0, rows: int = 3, length: int = 13) -> dict:
    """Tokens, padding and labels, as numpy arrays."""
    case = CASES[case] if isinstance(case, str) else case
    random = np.random.default_rng(seed)
    vocab = case.config["vocab_size"]
    pad = 0 if "T5" in case.kind or case.kind in ("Bert", "DistilBert", *ROTARY) else 1

    def text(length):
        mask = np.arange(length) < random.integers(3, length + 1, (rows, 1))
        mask[0] = True
        if case.kind in ROTARY and "Sequence" not in case.model:
            mask[1] = mask[1, ::-1]  # padding before it
        tokens = random.integers(3, vocab, (rows, length))
        return np.where(mask, tokens, pad).astype(np.int32), mask.astype(np.int32)

    batch = {}
    batch["inputs"], batch["mask"] = text(length)
    counts = batch["mask"] > 0

    def labels(count):
        return np.where(counts, random.integers(0, count, counts.shape), IGNORED).astype(np.int32)

    if case.kind in _SHIFTED and "Encoder" not in case.model:
        batch["source"], batch["source_mask"] = text(length + 4)
    if case.kind in ("Bert", "Roberta") and case.config.get("type_vocab_size", 2) > 1:
        batch["types"] = random.integers(0, 2, counts.shape).astype(np.int32)
    if case.model.endswith(("MaskedLM", "PreTraining", "Generation", "MTModel")):
        batch["labels"] = labels(vocab)
    if case.model.endswith("PreTraining"):
        batch["classes"] = random.integers(0, 2, rows).astype(np.int32)
    if case.model.endswith("SequenceClassification"):
        batch["classes"] = random.integers(0, case.config["num_labels"], rows).astype(np.int32)
    if case.model.endswith("TokenClassification"):
        batch["classes"] = labels(case.config["num_labels"])
    if case.model.endswith("Model") and "labels" not in batch:
        width = next(
            n for name, n in case.config.items() if name in ("hidden_size", "dim", "d_model")
        )
        batch["cotangent"] = random.normal(size=(*counts.shape, width)).astype(np.float32)
    return batch


def outputs(model, batch) -> dict[str, torch.Tensor]:
    """What is compared but gradients, and the loss that has them."""
    given = {name: torch.tensor(value) for name, value in batch.items()}
    named = {"output_hidden_states": True}
    if "source" in given:
        named |= {
            "input_ids": given["source"],
            "attention_mask": given["source_mask"],
            "decoder_input_ids": given["inputs"],
            "decoder_attention_mask": given["mask"],
        }
    else:
        named |= {"input_ids": given["inputs"], "attention_mask": given["mask"]}
        named |= {"token_type_ids": given["types"]} if "types" in given else {}
    if "labels" in given and "classes" in given:
        named["next_sentence_label"] = given["classes"].long()
    for name in ("classes", "labels"):
        if name in given:
            named["labels"] = given[name].long()
    out = model(**named)
    last = out.get("last_hidden_state")
    loss = out.get("loss")
    if "cotangent" in given:
        loss = (last * given["cotangent"] * given["mask"][..., None]).mean()
        if out.get("pooler_output") is not None:
            loss = loss + (out.pooler_output * given["cotangent"][:, 0]).mean()
    both = "source" in given
    hidden = {"hidden": out.decoder_hidden_states if both else out.hidden_states}
    hidden |= {"encoder_hidden": out.encoder_hidden_states} if both else {}
    found = {f"{n}.{i}": h for n, states in hidden.items() for i, h in enumerate(states)}
    heads = {"pooler_output": "pooled", "prediction_logits": "logits"}
    heads |= {"seq_relationship_logits": "scores"}
    heads["logits"] = "logits" if "labels" in given else "scores"
    found |= {ours: out[theirs] for theirs, ours in heads.items() if out.get(theirs) is not None}
    return found | {"loss": loss}


def computed(model, batch, scratch=None) -> tuple[dict, dict]:
    """As `family_checks.computed`; a tied tensor's gradient comes once."""
    model.zero_grad()
    found = outputs(model, batch)
    found["loss"].backward()
    gradients = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().numpy() for name, value in found.items()}, gradients


def greedy(model, batch, start: int, pad: int, steps: int) -> tuple[np.ndarray, int]:
    """transformers' greedy search from the sources of a batch, and the id at which rows stop.

    That is the one that the first row without an end would come to last.
    """

    def search(stop: int | None) -> np.ndarray:
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=steps,
            decoder_start_token_id=start,
            eos_token_id=stop,
            pad_token_id=pad,
        )
        tokens = model.generate(
            input_ids=torch.tensor(batch["source"]).long(),
            attention_mask=torch.tensor(batch["source_mask"]),
        )
        return tokens.numpy()

    endless = list(search(None)[0, :-1])
    stop = int(max(endless, key=endless.index))
    return search(stop), stop


# Which ids start and pad what a model generates.
_ZERO, _BARTS = {"start": 0, "pad": 0}, {"start": 2, "pad": 1}
ENDS = {"T5": _ZERO, "MT5": _ZERO, "Bart": _BARTS, "MBart": _BARTS}
