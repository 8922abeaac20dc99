"""Why attention: the history of sequence models measured again, in one report.

    python main.py --config=configs/why_attention.py

Trains RNN, GRU, LSTM and Transformer language models to repeat a text, and three encoder-decoders
of about 370,000 parameters (without embeddings) to copy and to translate: an LSTM with one vector
between, one with Bahdanau's attention, a Transformer. Writes `report.md`, `why_attention.png` and
`results.json` into the run directory.

Two CPU cores, no accelerator: 9 minutes of CPU time. Expect

    share of the last loss's gradient that arrives 24 tokens back, before training
        RNN 2e-7    GRU 4e-6    LSTM 0.2%    Transformer 0.8%
    and, of the Transformer, the only one that then learns to repeat, 39% when trained
                                                 copies of               translations of
    whole texts right, after 500 steps      8       16       24        4      7     10 words
        LSTM, one vector                  66%       3%       0%      16%     0%     0%
        LSTM with attention              100%      86%      70%      97%    69%    23%
        Transformer                      100%     100%     100%     100%    88%    48%

and of 1,024 tokens of one text, which an LSTM must read one after the other, about three times as
many a second through a Transformer of the same size.
"""

from lm.config import defaults
from lm.experiments.why_attention.config import WhyAttentionJob


def get_config():
    config = defaults(WhyAttentionJob)

    models = {
        "gradients": config.gradients.model,
        "fixed": config.bottleneck.fixed,
        "attending": config.bottleneck.attending,
        "transformer": config.bottleneck.transformer,
        "speed": config.speed.model,
    }
    for model in models.values():
        model.embedding_scale = 0.0  # × √width: recurrent networks have no norm to do it
        model.initializer = "lecun"

    # As many parameters in a Transformer's block as in a layer of LSTM cells: 8 × width².
    for name, width, layers in (("gradients", 64, 1), ("speed", 512, 2)):
        models[name].width, models[name].mlp_width = width, 2 * width
        models[name].num_layers = layers
    models["gradients"].initializer = "normal"
    models["gradients"].initializer_std = (3 * 64) ** -0.5  # as PyTorch starts recurrent layers
    models["gradients"].compute_dtype = "float32"

    # About 370k each, without the embedding.
    for name in ("fixed", "attending", "transformer"):
        models[name].architecture = "encoder_decoder"
    models["fixed"].cell = models["attending"].cell = "lstm"
    models["fixed"].cross_attention = False
    models["fixed"].num_layers, models["fixed"].width = 1, 152
    models["attending"].num_layers, models["attending"].width = 1, 128
    models["transformer"].num_layers, models["transformer"].width = 2, 96
    models["transformer"].mlp_width = 192
    models["transformer"].positions = "sinusoidal"

    config.bottleneck.tokenizer.kind = "bpe"
    config.bottleneck.tokenizer.vocab_size = 512

    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 0.02
    config.optimizer.warmup_steps = 20
    config.optimizer.final_fraction = 0.0
    config.optimizer.weight_decay = 0.0
    return config
