"""Known models are exactly as large as published, and impossible ones are refused."""

import pytest

from lm.config import ConfigError, defaults, view
from lm.jobs.train import TrainJob
from lm.models import ModelConfig, count, param_specs, skeleton
from lm.models.presets import PRESETS, preset

# Tied weights once. Of GPT-2, Llama and the like, what their published weights hold.
PUBLISHED = {
    "gpt1": 116_534_784,
    "gpt2_small": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "gpt3_175b": 174_604_259_328,
    "bert_base": 109_482_240,
    "bert_large": 335_141_888,
    "bert_base_mlm": 109_514_298,
    "roberta_base": 124_697_433,
    "distilbert_base": 66_985_530,
    "modernbert_base": 149_655_232,
    "modernbert_large": 395_881_664,
    "embeddinggemma_300m": 302_863_104,
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
    "bart_base": 139_420_416,
    "bart_large": 406_291_456,
    "mbart_large_cc25": 610_851_840,
    "mbart_large_50": 610_879_488,
    # 74,410,496 of transformers, less two tables of sinusoids, with the bias that is a buffer there
    "opus_mt": 73_944_309,
    "llama_7b": 6_738_415_616,
    "llama_13b": 13_015_864_320,
    "llama_30b": 32_528_943_616,
    "llama_65b": 65_285_660_672,
    "llama2_70b": 68_976_648_192,
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_1_405b": 405_853_388_800,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "mixtral_8x7b": 46_702_792_704,
    "mixtral_8x22b": 140_620_634_112,
    "deepseek_moe_16b": 16_375_728_128,
    "deepseek_v2": 235_741_434_880,
    "deepseek_v2_lite": 15_706_484_224,
    "deepseek_v3": 671_026_419_200,
    "moonlight_16b_a3b": 15_960_110_208,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_235b_a22b": 235_093_634_560,
    "smollm3_3b": 3_075_098_624,
    "olmo2_1b": 1_484_916_736,
    "olmo2_7b": 7_298_617_344,
    "olmo2_13b": 13_716_198_400,
    "olmo2_32b": 32_234_279_936,
    "gpt_oss_20b": 20_914_757_184,
    "gpt_oss_120b": 116_829_156_672,
    "gemma2_2b": 2_614_341_888,
    "gemma2_9b": 9_241_705_984,
    "gemma2_27b": 27_227_128_320,
    "gemma3_270m": 268_098_176,
    "gemma3_1b": 999_885_952,
    "opt_125m": 125_239_296,
    "opt_350m": 331_196_416,
    "phi3_mini_4k": 3_821_079_552,
    "phi3_5_mini": 3_821_079_552,
    "phi3_medium_4k": 13_960_238_080,
    "phi4": 14_659_507_200,
    "phi4_mini": 3_836_021_760,
    "bloom_560m": 559_214_592,
    "bloom_1b1": 1_065_314_304,
    "bloom_1b7": 1_722_408_960,
    "bloom_3b": 3_002_557_440,
    "bloom_7b1": 7_069_016_064,
    "bloom_176b": 176_247_271_424,
    "pythia_14m": 14_067_712,
    "pythia_31m": 30_494_720,
    "pythia_70m": 70_426_624,
    "pythia_160m": 162_322_944,
    "pythia_410m": 405_334_016,
    "pythia_1b": 1_011_781_632,
    "pythia_1_4b": 1_414_647_808,
    "pythia_2_8b": 2_775_208_960,
    "pythia_6_9b": 6_857_302_016,
    "pythia_12b": 11_846_072_320,
    "gpt_neox_20b": 20_554_567_680,
    "gpt_j_6b": 6_050_882_784,
    "falcon_7b": 6_921_720_704,
    "falcon_40b": 41_303_293_952,
    "falcon_180b": 178_557_088_768,
    "falcon2_11b": 11_102_822_400,
    "starcoder2_3b": 3_030_371_328,
    "starcoder2_7b": 7_173_923_840,
    "starcoder2_15b": 15_957_889_024,
}

# Sizes that were only published rounded, and how closely the counts must meet them.
ROUNDED = {
    "transformer_base": (63.1e6, 1e-3),  # table 3 says 65M, of some 37,000 tokens
    "transformer_big": (213e6, 0.01),
    "gpt3_small": (125e6, 0.02),
    "gpt3_medium": (350e6, 0.02),
    "gpt3_large": (760e6, 0.02),
    "gpt3_xl": (1.3e9, 0.02),
    "gpt3_2_7b": (2.7e9, 0.02),
    "gpt3_6_7b": (6.7e9, 0.02),
    "gpt3_13b": (13e9, 0.02),
    "palm_8b": (8.63e9, 1e-3),
    "palm_62b": (62.50e9, 1e-3),
    "palm_540b": (540.35e9, 1e-4),
    "llama2_7b": (6.7e9, 0.01),
    "llama2_13b": (13.0e9, 0.01),
    "llama3_1_8b": (8.03e9, 1e-3),
    "llama3_1_70b": (70.6e9, 1e-3),
    "bert_large_mlm": (335e6, 1e-3),
    "roberta_large": (355e6, 2e-3),
    "opt_1_3b": (1.3e9, 0.02),
    "opt_2_7b": (2.7e9, 0.02),
    "opt_6_7b": (6.7e9, 0.01),
    "opt_13b": (13e9, 0.02),
    "opt_30b": (30e9, 0.01),
    "opt_66b": (66e9, 0.01),
    "opt_175b": (175e9, 0.01),
    "olmo3_7b": (7.3e9, 1e-3),
    "olmo3_32b": (32.2e9, 2e-3),
    "gemma3_4b": (3.88e9, 1e-3),  # table 1: 675M + 3,209M
    "gemma3_12b": (11.77e9, 1e-3),  # 1,012M + 10,759M
    "gemma3_27b": (27.02e9, 1e-3),  # 1,416M + 25,600M
}


def size(name, **overrides):
    return count(param_specs(skeleton(preset(name, **overrides))))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_exactly_the_published_number_of_parameters(name):
    assert size(name) == PUBLISHED[name]


@pytest.mark.parametrize("name", ROUNDED)
def test_a_preset_has_the_published_size(name):
    published, tolerance = ROUNDED[name]
    assert size(name) == pytest.approx(published, rel=tolerance)


def test_every_preset_is_checked_and_has_a_source():
    assert set(PRESETS) == set(PUBLISHED) | set(ROUNDED)
    assert all(known.source for known in PRESETS.values())


@pytest.mark.parametrize("width", [512, 1024])
def test_the_first_transformer_by_hand(width):
    matrix, attention = width * 4 * width, 4 * (width * width + width)
    hidden, norm = 2 * matrix + 5 * width, 2 * width
    encoder = 6 * (attention + hidden + 2 * norm)
    decoder = 6 * (2 * attention + hidden + 3 * norm)
    name = {512: "transformer_base", 1024: "transformer_big"}[width]
    assert size(name) == 37_000 * width + encoder + decoder


def test_overrides_replace_fields_and_the_rest_follows():
    config = preset("gpt2_small", num_layers=2, width=24, num_heads=3)
    assert (config.num_layers, config.feed_forward, config.head_width) == (2, 96, 8)
    assert (config.vocab_size, config.positions) == (50_257, "learned")
    assert size("llama3_1_405b", num_layers=1) < 1e10


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("gpt2_smal", {}, ["config.preset='gpt2_smal'", "did you mean 'gpt2_small'"]),
        ("", {}, ["config.preset=''"]),
        ("gpt2_small", {"widht": 3}, ["config.model.widht", "did you mean 'width'"]),
        ("gpt2_small", {"width": 770}, ["width=770", "num_heads=12", "num_heads=11"]),
        ("gpt2_small", {"width": "770"}, ["config.model.width='770'", "int"]),
        ("llama3_8b", {"num_kv_heads": 5}, ["num_kv_heads=5", "num_heads=32"]),
        ("llama3_8b", {"num_layers": 0}, ["num_layers=0", "at least 1"]),
        ("mistral_7b", {"window": 0}, ["window=0", "positive"]),
        ("pythia_160m", {"rotary_fraction": 0.26, "head_dim": 50}, ["rotary_fraction=0.26"]),
        ("mixtral_8x7b", {"experts_per_token": 9}, ["experts_per_token=9", "num_experts=8"]),
        ("mixtral_8x7b", {"activation": "relu"}, ["activation='relu'", "swiglu"]),
        ("t5_small", {"architecture": "decodr"}, ["architecture='decodr'", "'decoder'"]),
        ("bert_base", {"architecture": "decoder"}, ["pooler", "architecture='encoder'"]),
        ("bloom_560m", {"architecture": "encoder"}, ["positions='alibi'", "decoder"]),
    ],
)
def test_impossible_presets_are_refused_in_one_line_that_names_the_field(name, overrides, words):
    with pytest.raises(ConfigError) as refused:
        preset(name, **overrides)
    assert "\n" not in str(refused.value)
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("name", PRESETS)
def test_a_config_file_can_start_from_a_preset(name):
    config = defaults(TrainJob)
    config.model = defaults(preset(name))
    assert view(ModelConfig, config.model) == preset(name)


def test_a_preset_in_a_config_file_takes_every_type_its_fields_allow():
    config = defaults(preset("gpt2_small"))
    config.lock()
    config.num_kv_heads, config.attention_scale, config.scan_layers = 4, 0.5, True
    config.attention_pattern = ("local", "global")
    config.window = 8
    changed = view(ModelConfig, config)
    assert (changed.kv_heads, changed.attention_scale, changed.window) == (4, 0.5, 8)
    config.num_kv_heads = None
    assert view(ModelConfig, config).kv_heads == 12
