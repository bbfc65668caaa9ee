"""What a plan says, against what can be counted: parameters, LoRA, saved activations, steps, measured memory."""

import gzip
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel

from cotvalve import costs, pipeline, plan, problems
from cotvalve.architectures import Architecture, architecture
from cotvalve.costs import ALLOCATOR, CARDS, GIB, Range
from cotvalve.errors import SettingError
from cotvalve.fitting import FitSettings
from cotvalve.mixchain import MixSettings
from cotvalve.train import TrainSettings
from cotvalve.valve import Valve
from tests import models
from tests.test_recipes import RECIPES

QWEN_32B = Architecture("qwen2", 64, 5120, 40, 8, 128, 27648, 152064, False, "test")
QWEN_15B = Architecture("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, "test")
LLAMA_8B = Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, "test")


def recipe(folder: Path, steps: str, sizes: str = "") -> pipeline.Recipe:
    path = folder / "mine.yaml"
    path.write_text(f"name: mine\nsteps:\n{steps}\n{sizes}", encoding="utf-8")
    return pipeline.read(str(path), out=str(folder / "out"))


def row(text: str, step: str) -> list[str]:
    """The cells of a step's row in the table."""
    line = next(line for line in text.splitlines() if line.startswith(f"{step} "))
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_plans(name: str) -> None:
    found = pipeline.read(name)
    text = plan.describe(found)
    assert text.startswith(f"{name}: ")
    for step in found.steps:
        assert row(text, step.name)[1] == step.verb
    assert row(text, "total")
    for said in ("GPU-hours", "Memory (GiB)", "How this is counted", "Table 9"):
        assert said in text
    assert "nan" not in text
    assert "inf" not in text.replace("info", "")


@pytest.mark.parametrize(
    ("name", "model", "parameters"),
    # as counted by transformers on the published configs
    [
        ("qwq-32b-preview", "Qwen/QwQ-32B-Preview", 32_763_876_352),
        ("qwen2.5-32b-instruct-limo", "Qwen/Qwen2.5-32B-Instruct", 32_763_876_352),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("r1-distill-llama-8b", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", 8_030_261_248),
        ("llama-3.2-1b-instruct", "meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("qwen2.5-coder-1.5b", "Qwen/Qwen2.5-Coder-1.5B-Instruct", 1_543_714_304),
    ],
)
def test_sizes_make_the_published_number_of_parameters(name: str, model: str, parameters: int) -> None:
    assert architecture(model, pipeline.read(name).sizes["models"]).parameters == parameters


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_parameters_and_lora_are_those_of_the_real_modules(family: str, tied: bool, tmp_path: Path) -> None:
    model = models.MAKERS[family](tied=tied)
    shape = architecture(str(models.save(model, tmp_path)), {})
    assert shape.parameters == sum(weight.numel() for weight in model.parameters())
    for modules in ("all", "attention", "mlp", "q_proj,o_proj"):
        settings = FitSettings(rank=3, modules=modules)
        valve = Valve.fresh(models.MAKERS[family](tied=tied), models.tokenizer(), settings.lora(model))
        learned = sum(weight.numel() for name, weight in valve.model.named_parameters() if ".lora_" in name)
        assert shape.lora(3, modules) == learned
    with pytest.raises(SettingError, match=r"unknown module 'q_porj': did you mean 'q_proj'\?"):
        shape.lora(3, "q_porj")


def test_table_11_s_parameter_fractions() -> None:
    """The paper's own: rank 2 on QwQ-32B, K+V .005, Q .004, O .004, attention .013, MLP .038, all .051 percent."""
    sets = ["k_proj,v_proj", "q_proj", "o_proj", "attention", "mlp", "all"]
    shares = [round(100 * QWEN_32B.lora(2, modules) / QWEN_32B.parameters, 3) for modules in sets]
    assert shares == [0.005, 0.004, 0.004, 0.013, 0.038, 0.051]


def saved(shape: Architecture, checkpointing: bool, tokens: int = 64) -> float:
    """Bytes per token that autograd keeps of a tiny model in bf16 with an fp32 LoRA, weights apart."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.mlp, num_attention_heads=shape.heads, head_dim=shape.head_dim,
        num_key_value_heads=shape.kv_heads, num_hidden_layers=shape.layers, vocab_size=shape.vocabulary,
        max_position_embeddings=256,
    )  # fmt: skip
    model: PreTrainedModel = LlamaForCausalLM(config).to(torch.bfloat16)
    valve = Valve.fresh(model, models.tokenizer(), FitSettings(rank=1).lora(model))
    for name, weight in model.named_parameters():
        weight.requires_grad_(".lora_" in name)
        weight.data = weight.data.float() if ".lora_" in name else weight.data
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(1, tokens, dtype=torch.long)
    saving = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    casting = disable_input_dtype_casting(valve.peft_model)  # as in train.fit
    with saving, casting, torch.autocast("cpu", torch.bfloat16), valve.at(torch.tensor([0.5])):
        model.get_decoder()(input_ids=ids, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values()) / tokens


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "shape",
    [
        Architecture("llama", 2, 256, 4, 1, 64, 1024, 64, True, ""),
        Architecture("llama", 2, 128, 4, 4, 32, 768, 64, True, ""),
        Architecture("llama", 2, 256, 8, 2, 16, 256, 64, True, ""),
    ],
)
def test_activations_are_what_autograd_keeps(shape: Architecture) -> None:
    more = replace(shape, layers=4)
    for checkpointing in (False, True):
        # Two models that differ in layers: what is kept once (rotary tables, the loss) falls out.
        measured = saved(more, checkpointing) - saved(shape, checkpointing)
        estimate = more.kept(checkpointing) - shape.kept(checkpointing)
        # 10 %: a fit of four numbers to several shapes, and small tensors (norms' variances) it leaves out.
        assert estimate == pytest.approx(measured, rel=0.10)


@pytest.mark.parametrize(("checkpointing", "measured"), [(False, 51.0), (True, 8.2)])
def test_training_memory_against_a_gpu(checkpointing: bool, measured: float) -> None:
    """One H100, torch 2.11: 1.5B, rank 16, 640 examples of 358 tokens (longest 470): peak of allocated memory in GiB.

    20 %: that run cast the adapters' inputs to fp32 as well, and its micro-batches had a little less than the longest.
    """
    settings = TrainSettings(rank=16, gradient_checkpointing=checkpointing, max_length=470)
    memory = costs.training_memory(QWEN_15B, settings, Range.of(358))
    allocated = (memory.weights + memory.learned + memory.logits + memory.kept.high / ALLOCATOR) / GIB
    assert allocated == pytest.approx(measured, rel=0.2)


def test_portions_that_shrink_fit_a_smaller_card() -> None:
    """The learner halves its portions when memory runs out; rows that were asked for at once stay."""
    large, small = CARDS[:2]
    memory = costs.training_memory(QWEN_15B, TrainSettings(rank=16, max_length=1280), Range.of(358))
    assert memory.kept.high > small.memory > memory.least > 0
    assert memory.cards(large) == memory.cards(small) == 1
    assert f"(down to {Range.of(memory.least / GIB)} where memory is short)" in str(memory)
    asked = costs.training_memory(QWEN_15B, TrainSettings(rank=16, max_length=1280, micro_batch=16), Range.of(358))
    assert asked.cards(small) == 0
    assert "down to" not in str(asked)


def test_rates_against_a_gpu() -> None:
    """One H100, docs/performance.md: 2,048 chains of 200 tokens at 58,755 to 60,421 tokens a second, training at 55,449."""
    at = costs.SamplingMemory(QWEN_15B.parameters * 2.0, 0, 2048, 1)
    hours = costs.sampling_hours(QWEN_15B, 100, 2048, Range.of(200), at, CARDS[0])
    slowest, fastest = (2048 * 200 / (h * 3600) for h in (hours.high, hours.low))
    assert slowest < 58_755
    assert 60_421 < fastest < 3 * 60_421
    hours = costs.training_hours(QWEN_15B, TrainSettings(rank=16), Range.of(1e6), Range.of(358), CARDS[0])
    assert 1e6 / (hours.high * 3600) < 55_449 < 1e6 / (hours.low * 3600)


def test_cache_of_a_token() -> None:
    # 2 (keys, values) x 32 layers x 8 heads x 128 x 2 bytes
    assert LLAMA_8B.cache() == 131_072
    assert QWEN_32B.cache() == 262_144


def test_training_hours_on_paper() -> None:
    shape = Architecture("llama", 1, 1000, 10, 10, 100, 1000, 1000, True, "test")
    # 4 x 1000 x 1000 in attention, 3 x 1000 x 1000 in the feed-forward layer, norms 3000, embedding 10^6 used once
    assert shape.parameters == shape.multiplied == 8_003_000
    card = replace(CARDS[0], flops=1e12)
    tokens, length = Range.of(1e6), Range.of(100.0)

    def work(**settings: object) -> float:
        hours = costs.training_hours(shape, TrainSettings(**settings), tokens, length, card)
        assert hours.high / hours.low == pytest.approx(0.4 / 0.15)
        return hours.low * 3600 * 0.4 * 1e12

    # attention: forward 2 x 1 layer x 1000 wide x 100 tokens, backward twice that
    assert work() == pytest.approx(1e6 * (4 * 8_003_000 + 3 * 200_000))
    assert work(gradient_checkpointing=True) == pytest.approx(1e6 * (6 * 8_003_000 + 4 * 200_000))
    # the pass before the first step of a bounded reward
    assert work(recipe="reward") == pytest.approx(1e6 * (6 * 8_003_000 + 4 * 200_000))
    assert work(recipe="reward", trust=0) == work()
    assert work(full=True) == pytest.approx(1e6 * (6 * 8_003_000 + 3 * 200_000))


def test_how_many_cards_training_needs() -> None:
    small = {"micro_batch": 1, "batch": 4, "gradient_checkpointing": True, "max_length": 2048}
    full = costs.training_memory(QWEN_32B, TrainSettings(full=True, **small), Range.of(1000))
    # 16 bytes for each of 32.76 billion
    assert full.learned == pytest.approx(524.2e9, rel=1e-3)
    assert 7 <= full.cards(CARDS[0]) <= 9
    lora = costs.training_memory(QWEN_32B, TrainSettings(rank=2, **small), Range.of(1000))
    # 24 GB: 22.4 usable less 1.5, logits 3.5 and activations 2.3 leave 15.1 for a share of 61.3
    assert (lora.cards(CARDS[0]), lora.cards(CARDS[1])) == (1, 5)
    packed = costs.training_memory(QWEN_32B, TrainSettings(rank=2, quantize_4bit=True, **small), Range.of(1000))
    assert packed.weights / GIB == pytest.approx(17.8, abs=1)
    assert packed.cards(CARDS[0]) == 1
    rows = [costs.training_memory(QWEN_32B, TrainSettings(rank=2, packing=packing, max_length=4096), Range.of(100)).least for packing in (False, True)]
    assert rows[1] / rows[0] == pytest.approx(4096 / 400), "packed rows are all as long as they may be"
    unfit = costs.training_memory(QWEN_32B, TrainSettings(rank=2, micro_batch=64, max_length=8192), Range.of(2000))
    assert unfit.cards(CARDS[0]) == 0


def test_slots_are_the_engine_s() -> None:
    settings = MixSettings(max_new_tokens=1880)
    at = costs.sampling_memory(LLAMA_8B, settings, 120, 1e6, CARDS[0])
    chain = 131_072 * 2000 + 128_256 * 16
    assert at.chain == chain
    assert at.slots == int(0.7 * (CARDS[0].memory - 1.5 * GIB - at.weights) / chain)
    assert costs.sampling_memory(LLAMA_8B, settings, 120, 7, CARDS[0]).slots == 7
    assert costs.sampling_memory(LLAMA_8B, settings.but(slots=3), 120, 1e6, CARDS[0]).slots == 3
    assert costs.sampling_memory(QWEN_32B, settings, 120, 1e6, CARDS[1]).cards == 3
    full = replace(CARDS[0], memory=at.weights + costs.RESERVED + 1e6)
    assert costs.sampling_memory(LLAMA_8B, settings, 120, 1e6, full).cards == 2, "the weights alone would fit"


def test_sampling_hours_on_paper() -> None:
    shape = Architecture("llama", 3, 1000, 10, 10, 100, 1000, 1000, True, "test")
    card = replace(CARDS[0], flops=1e12, bandwidth=1e9)

    def seconds(card: costs.Card, cards: int) -> Range:
        """20 chains of 100 tokens behind 50, ten at once: 200 steps."""
        at = costs.SamplingMemory(1e9, 0, 10, cards)
        return costs.sampling_hours(shape, 50, 20, Range.of(100), at, card) * 3600

    prompts = 20 * 50 * 2 * shape.multiplied / 1e12
    # Half of the answer is there in the mean: 100 tokens of 12,000 bytes and 1,000 logits of 16, ten times, and the weights.
    read = (100 * 12_000 + 16_000) * 10 + 1e9
    found = seconds(card, 1)
    assert found.low == pytest.approx(200 * (read / 0.6e9 + 3 * 0.1e-3) + prompts / 0.4)
    assert found.high == pytest.approx(200 * (read / 0.3e9 + 3 * 0.6e-3) + prompts / 0.15)
    # Two cards read half each; the launches are those of both.
    assert seconds(card, 2).low == pytest.approx(200 * (read / 0.6e9 + 2 * 3 * 0.1e-3) + prompts / 0.4)
    slow = seconds(replace(card, bandwidth=1e30), 1)
    assert slow.low == pytest.approx(200 * (10 * 2 * shape.multiplied / 0.5e12 + 3 * 0.1e-3) + prompts / 0.4), "multiplying takes longer"


def test_steps_and_questions_are_exact_where_they_are_known() -> None:
    text = plan.describe(pipeline.read("qwq-32b-preview"))
    # Table 7's direct run, five times in batches of 64: 7,473 questions less the 518 held out, as results/*/valve-train.json has it
    assert problems.trainable("gsm8k") == 6955
    assert row(text, "valve")[3] == str(math.ceil(6955 / 64) * 5)
    assert "6,955 examples x 5 epochs" in text
    # four directions at seven positions beside 0; budget-qwq at six budgets, shortcut; the plain model
    assert "1,319 of gsm8k x (28 positions of 4 directions, 7 baselines, 1 plain) x 1 sample" in text
    text = plan.describe(pipeline.read("recipes/reproduction/briefer.yaml"))
    assert "518 of gsm8k x (39 positions of 3 directions, 0 baselines, 1 plain)" in text  # all that are held out
    text = plan.describe(pipeline.read("llama-3.2-1b-instruct"))
    assert row(text, "progressive")[3] == str(math.ceil(6863 / 64) * 2 * 4)


def test_tokens_come_from_table_9(tmp_path: Path) -> None:
    sizes = f"sizes: {{models: {{some/model: {json.dumps(numbers())}}}}}"
    steps = "  one: {verb: train, model: some/model, data: horseee/MixChain-Z-GSM8K, solution: 1}\n"
    steps += "  all: {verb: train, model: some/model, data: horseee/MixChain-Z-GSM8K, recipe: progressive}\n"
    text = plan.describe(recipe(tmp_path, steps, sizes))
    assert row(text, "one")[2] == str(Range.of(6863 * (279.6 + plan.PROMPT)))
    assert row(text, "all")[2] == str(Range.of(6863 * (116.0 + 279.6 + 310.7 + 386.7 + 497.2 + 5 * plan.PROMPT)))


def test_what_is_sampled_and_what_is_learned_from_it_on_paper(tmp_path: Path) -> None:
    """Answers by data set and by step, at most as long as may be written; of 100 questions 70 to 100 keep their chains."""
    sizes = f"""sizes:
  models: {{some/model: {json.dumps(numbers())}}}
  data: {{gsm8k: {{answers: [100, 300]}}}}
  steps: {{human: {{answers: [200, 300]}}}}
"""
    text = plan.describe(recipe(tmp_path, """
  mix: {verb: mix, model: some/model, direction: some/dial, data: gsm8k, limit: 100, max_new_tokens: 200}
  human: {verb: mix, model: some/model, direction: some/dial, data: gsm8k, limit: 100, solutions: true}
  valve: {verb: train, model: some/model, data: $mix, epochs: 2}
  plus: {verb: train, recipe: plus, model: some/model, data: $human}
  few: {verb: mix, model: some/model, data: gsm8k, limit: 100}
  both: {verb: train, recipe: plus, model: some/model, data: $few}
  sweep: {verb: sweep, model: some/model, direction: some/dial, data: gsm8k, limit: 10, alphas: "0,0.5,1", baselines: shortcut}
  two: {verb: train, recipe: progressive, model: some/model, data: horseee/MixChain-Z-GSM8K, stages: 2}
  cut: {verb: train, model: some/model, data: horseee/MixChain-Z-GSM8K, solution: 4, max_length: 300, limit: 50}
""", sizes))  # fmt: skip
    tokens = {name: row(text, name)[2] for name in ("mix", "valve", "plus", "two", "cut", "sweep")}
    assert tokens["mix"] == str(Range(1200 * 100, 1200 * 200)), "six positions, two samples"
    # The shortest chain of a question, which is at most half way to the longest in the mean.
    assert tokens["valve"] == str(Range(2 * 70 * (100 + plan.PROMPT), 2 * 100 * (150 + plan.PROMPT)))
    # 0.7 x 12 chains and the human one, to all 13 of them, less the longest.
    assert tokens["plus"] == str(Range(70 * 8.4 * (121.8 + plan.PROMPT), 100 * 12 * (300 + plan.PROMPT)))
    assert "plus: 70 to 100 examples" in text, "two chains of a question, or none that is kept"
    assert tokens["sweep"] == str(Range(10 * 4 * 100, 10 * 4 * 300)), "two positions, a baseline and the plain model"
    assert tokens["two"] == str(Range.of(6863 * (497.2 + 386.7 + 2 * plan.PROMPT))), "the longest first"
    assert tokens["cut"] == str(Range.of(50 * (300 + plan.PROMPT)))


def numbers(**changed: object) -> dict[str, object]:
    plain: dict[str, object] = {
        "family": "qwen2", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "mlp": 64,
        "vocabulary": models.VOCABULARY, "tied": True,
    }  # fmt: skip
    return {**plain, **changed}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"layers": 3}, "layers is 3, but "),
        ({"tied": False}, "tied is False, but "),
        ({"vocabulary": 271}, "vocabulary is 271, but "),
        ({"family": "llama"}, "family is llama, but "),
        ({"layres": 2}, "unknown field 'layres': did you mean 'layers'?"),
        ({"parameters": 1.5}, "parameters is 1.5, but its other numbers make "),
    ],
)
def test_a_config_that_contradicts_the_recipe_is_named(changed: dict[str, object], says: str, tmp_path: Path) -> None:
    where = str(models.save(models.qwen2(tied=True), tmp_path / "model"))
    assert architecture(where, {where: numbers()}).source == f"config in {where}"
    with pytest.raises(SettingError) as error:
        architecture(where, {where: numbers(**changed)})
    assert f"sizes: models: {where}: {says}" in str(error.value)


def test_the_hub_s_cache_is_looked_at_and_the_hub_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--some--model"
    models.qwen2(tied=True).config.save_pretrained(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    assert architecture("some/model", {}).layers == 2
    with pytest.raises(SettingError, match=r"layers is 9, but .*config\.json says 2; correct the recipe"):
        architecture("some/model", {"some/model": numbers(layers=9)})
    with pytest.raises(SettingError, match=r"the size of model 'some/other' is not known: .* in the recipe, which has some/model$"):
        architecture("some/other", {"some/model": numbers()})


def test_another_model_s_sizes_come_from_its_config(tmp_path: Path, command: Callable[..., tuple[int, str]]) -> None:
    """`run --plan RECIPE --model X`: a folder with a config.json is enough; without one the way out is said."""
    folder = tmp_path / "mine"
    models.llama(layers=3).config.save_pretrained(folder)
    told = plan.describe(pipeline.read("qwen2.5-coder-1.5b", model=str(folder)))
    assert re.search(rf"^{re.escape(str(folder))}: llama, 4\.53e-05 billion parameters \(config in ", told, re.MULTILINE), told
    code, said = command("run", "--plan", "qwen2.5-coder-1.5b", "--model", str(folder))
    assert (code, said) == (0, "")
    (tmp_path / "empty").mkdir()
    for name, why in ((str(tmp_path / "empty"), "no config.json in that folder"), ("some/other", "no such folder here")):
        code, said = command("run", "--plan", "qwen2.5-coder-1.5b", "--model", name)
        assert code == 2
        assert f"the size of model '{name}' is not known: {why}" in said
        assert "name a folder that holds its config.json" in said
        assert "sizes: models: in the recipe" in said
        assert len(said.splitlines()) == 1


def test_what_cannot_be_planned_says_what_is_missing(tmp_path: Path) -> None:
    where = models.save(models.qwen2(tied=True), tmp_path / "model")
    with pytest.raises(SettingError, match=r"^mine: the size of data 'mine\.jsonl' is not known: .* \{questions: \.\.\.\}$"):
        plan.describe(recipe(tmp_path, f"  mix: {{verb: mix, model: {where}, data: mine.jsonl}}"))
    with pytest.raises(SettingError, match=r"^mine: the size of model 'some/model' is not known"):
        plan.describe(recipe(tmp_path, "  mix: {verb: mix, model: some/model}"))
    config = json.loads((where / "config.json").read_text()) | {"model_type": "mamba"}
    (where / "config.json").write_text(json.dumps(config))
    with pytest.raises(SettingError, match="is a mamba; a plan counts llama, mistral, qwen2, qwen3"):
        plan.describe(recipe(tmp_path, f"  mix: {{verb: mix, model: {where}}}"))


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ("modles: {}", "unknown field 'modles': did you mean 'models'?"),
        ("data: {gsm8k: {answer: [1, 2]}}", "data: gsm8k: unknown field 'answer': did you mean 'answers'?"),
        ("steps: {mxi: {answers: [1, 2]}}", "steps: unknown step 'mxi': did you mean 'mix'?"),
        # These were tracebacks.
        ("data: [gsm8k]", "data is ['gsm8k'], expected names with values"),
        ("data: {gsm8k: 5}", "data: gsm8k is 5, expected names with values"),
        ("data: {gsm8k: {answers: 5}}", "data: gsm8k: answers is 5, expected two numbers"),
        ("data: {gsm8k: {answers: [5, many]}}", "data: gsm8k: answers is [5, 'many'], expected two numbers"),
        ("data: {mine: {questions: many}}", "data: mine: questions is 'many', expected a number above 0"),
        ("models: {some/model: 5}", "models: some/model is 5, expected names with values"),
        ("models: {some/model: {layers: many}}", "models: some/model: layers is 'many', expected a number above 0"),
        ("models: {some/model: {tied: 1}}", "models: some/model: tied is 1, expected true or false"),
    ],
)
def test_misspelt_sizes_are_refused(sizes: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError) as error:
        plan.describe(recipe(tmp_path, "  mix: {verb: mix}", f"sizes: {{{sizes}}}"))
    assert str(error.value).startswith(f"mine: sizes: {says}")


def test_a_sweep_is_counted_on_the_split_that_it_will_answer(tmp_path: Path) -> None:
    """All questions of a file were counted where a fifteenth is asked, and a split that is none as the training questions."""
    where = models.save(models.qwen2(tied=True), tmp_path / "model")
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(f'{{"question": "{i} + 1?", "answer": "{i + 1}"}}\n' for i in range(150)))
    held = len(problems.load(str(data), split="heldout"))
    assert 0 < held < 30
    for split, count in (("test", 150), ("heldout", held)):
        text = plan.describe(recipe(tmp_path, f"  sweep: {{verb: sweep, model: {where}, data: {data}, split: {split}}}"))
        assert f"{count} of {data} x " in text
    for verb, name, split in (("sweep", "gsm8k", "hedlout"), ("sweep", "math500", "heldout"), ("sweep", str(data), "train")):
        with pytest.raises(SettingError, match=f"unknown split of {name} '{split}'"):
            plan.describe(recipe(tmp_path, f"  a: {{verb: {verb}, model: {where}, data: {name}, split: {split}}}"))
    with pytest.raises(SettingError, match="unknown split of math500 'train'"):
        plan.describe(recipe(tmp_path, f"  a: {{verb: mix, model: {where}, data: math500}}"))


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json"])
def test_chains_in_a_file_are_counted_as_they_stand(tmp_path: Path, kind: str) -> None:
    """A .json file was no data set, and of JSON lines `plus` counted nothing: one chain a question, with beta 0."""
    where = models.save(models.qwen2(tied=True), tmp_path / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "solution_0": "x" * 350, "solution_1": "y" * 700, "solution_2": "z" * 35} for n in range(10)]
    data = tmp_path / f"theirs.{kind}"
    text = json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows))
    data.write_bytes(gzip.compress(text.encode()) if kind == "jsonl.gz" else text.encode())
    told = plan.describe(recipe(tmp_path, f"""\
  valve: {{verb: train, recipe: valve, model: {where}, data: {data}}}
  plus: {{verb: train, recipe: plus, model: {where}, data: {data}}}
  progressive: {{verb: train, recipe: progressive, model: {where}, data: {data}}}"""))
    for said in ("valve: 10 examples x 1 epoch", "plus: 20 examples x 1 epoch", "progressive: 10 examples x 1 epoch x 3 stages"):
        assert said in told
    (row,) = (line for line in told.splitlines() if line.startswith("plus ") and "train" in line)
    assert " 2,600 to 6,400 " in row, "20 chains of 10 to 200 tokens, 3.5 characters each, with their prompts"


def test_files_runs_and_made_checkpoints_of_one_s_own(tmp_path: Path) -> None:
    where = models.save(models.qwen2(tied=True), tmp_path / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1), "solution": "x" * 350} for n in range(10)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    report = {"kept_questions": 8, "kept": 24, "by_alpha": {"0": {"mean_tokens": 200}, "1": {"mean_tokens": 50}}}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mix.json").write_text(json.dumps(report))
    steps = f"""
  full: {{verb: train, full: true, model: {where}, data: {tmp_path}/mine.jsonl}}
  again: {{verb: mix, model: $full, data: {tmp_path}/mine.jsonl, limit: 4}}
  plus: {{verb: train, recipe: plus, model: {where}, data: {tmp_path}/old}}
  fused: {{verb: fuse, model: {where}, direction: $plus}}
  sweep: {{verb: sweep, model: $fused, data: {tmp_path}/mine.jsonl}}"""
    text = plan.describe(recipe(tmp_path, steps))
    # 350 characters are about 100 tokens
    assert row(text, "full")[2] == str(Range.of(10 * (100 + plan.PROMPT)))
    assert "4 questions x 1 position x 2 samples" in text
    assert "plus: 16 examples" in text
    assert "10 of " in text


def test_the_pieces_of_a_range() -> None:
    assert str(Range.of(0)) == "0"
    assert str(Range.of(2) * Range(1, 3) + 1) == "3 to 7"
    assert str(Range(1, 2) / Range(0.25, 0.5)) == "2 to 8"
    assert str(Range(99_999, 123_456)) == "100 k to 120 k"
    assert Range(3, 9).capped(5) == Range(3, 5)


def test_more_of_anything_never_costs_less() -> None:
    base = TrainSettings(rank=8)
    tokens, length = Range(1e6, 2e6), Range(100, 200)

    def cost(change: Callable[[TrainSettings], TrainSettings]) -> tuple[float, float]:
        settings = change(base)
        memory = costs.training_memory(LLAMA_8B, settings, length)
        hours = costs.training_hours(LLAMA_8B, settings, tokens, length, CARDS[0])
        assert 0 < hours.low < hours.high
        return memory.weights + memory.learned + memory.kept.high, hours.high

    plain = cost(lambda s: s)
    assert cost(lambda s: s.but(rank=64))[0] > plain[0]
    assert cost(lambda s: s.but(micro_batch=64))[0] > plain[0]
    less, slower = cost(lambda s: s.but(gradient_checkpointing=True))
    assert less < plain[0]
    assert slower > plain[1]
