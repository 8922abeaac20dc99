"""Decoders that judge texts (*ForSequenceClassification) are the same here as in transformers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import decoder_oracles  # noqa: E402
import family_checks  # noqa: E402

from lm.models.huggingface.write import save_pretrained  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

PAD = 0  # no text has it
SLOW = [n for n in decoder_oracles.FAMILIES if n not in ("gpt2", "llama", "qwen2", "mistral")]
NAMES = [
    pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
    for name in decoder_oracles.FAMILIES
]


@pytest.mark.parametrize("name", NAMES)
def test_scores_and_gradients_are_the_same_and_so_is_what_is_exported(name, tmp_path):
    labels = 3
    model = decoder_oracles.build(
        name, "ForSequenceClassification", num_labels=labels, pad_token_id=PAD
    )
    batch = family_checks.text_batch()
    batch["inputs"] = np.where(batch["mask"], batch["inputs"], PAD)
    batch["classes"] = np.arange(len(batch["inputs"]), dtype=np.int32) % labels
    del batch["labels"]
    model.save_pretrained(tmp_path / "theirs")
    ours = family_checks.load(tmp_path / "theirs", scan_layers=True)
    assert ours[1].classifier == "sequence" and ours[1].num_labels == labels
    assert "head" not in ours[2]

    found, gradient = family_checks.computed(*ours, batch, taps=False)
    expected, expected_gradient = decoder_oracles.computed(model, batch, tmp_path / "gradient")
    errors = family_checks.worst(found, expected, batch)
    assert max(errors.values()) < family_checks.OUTPUTS, errors
    relative = family_checks.worst_gradients(gradient, expected_gradient)
    assert max(relative.values()) < family_checks.GRADIENTS, relative

    save_pretrained(tmp_path / "ours", *ours)
    back, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert type(back) is type(model) and not any(report.values()), report
    tensors = back.state_dict()
    for tensor, expected in model.state_dict().items():
        assert torch.equal(tensors[tensor], expected), tensor
