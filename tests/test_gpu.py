"""What only a GPU can show: CUDA graphs, flash attention over rows of unlike length, FlashOptim. `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from trimlingual.data.sources import read_source
from trimlingual.decoding.attention import flash_attention
from trimlingual.decoding.decoder import PackedDecoder
from trimlingual.decoding.loop import Stepper
from trimlingual.decoding.shared_prompts import Prefixes, SharedPrefixes
from trimlingual.decoding.slots import Slots
from trimlingual.decoding.translate_clips import embed_prompt, encode_clips, greedy, translate_clips
from trimlingual.models import humming_layers
from trimlingual.models.family import family_of
from trimlingual.models.inputs import Example, Prompter, TrainingData
from trimlingual.models.loading import load_model, load_processor, resolve_base
from trimlingual.models.packed_layers import EightBitLinear, PackedLinear, TorchLinear, head_of
from trimlingual.quantization.int4 import save_packed
from trimlingual.recipe import QuantizeSettings, TrainSettings, load_recipe
from trimlingual.search.from_parent import Trace, trace, translate_changed, translate_without
from trimlingual.search.rounded import RoundedModel
from trimlingual.training.optimizer import flash_adamw
from trimlingual.training.trainer import train_

from .test_from_parent import SHAPES, random_case
from .test_packed import drawn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("number", range(0, len(SHAPES), 3))
def test_every_candidate_equals_decoding_anew(make_model, processor, split, task, number):
    """In float32, with graphs: candidates alone, together, and the CPU's decoding."""
    model, eos, layers, prompts, limits = random_case(make_model, processor, split, task, number, torch.float32)
    on_cpu = Stepper(PackedDecoder(model), eos)
    expected = [greedy(on_cpu, prompts, limits, 99, [i for i in layers if i != gone]) for gone in layers]
    model, prompts = model.cuda(), [prompt.cuda() for prompt in prompts]
    stepper = Stepper(PackedDecoder(model), eos)
    parent = greedy(stepper, prompts, limits, 5)
    traced = trace(stepper.decoder, prompts, parent, limits, layers, layers)
    together = translate_without(stepper, traced, layers)
    alone = [translate_without(stepper, traced, [gone])[0] for gone in layers]
    pairs = [(a, b, c) for x, y, z in zip(together, alone, expected) for a, b, c in zip(x, y, z)]
    assert sum(a == b == c for a, b, c in pairs) >= len(pairs) - 1  # a near-tie may fall another way


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    recipe, folder = load_recipe("mini"), resolve_base("builtin:mini")
    clips = read_source(recipe.data.select, ["de", "zh"], tmp_path_factory.mktemp("clips"))
    return recipe, folder, clips


def in_bfloat16(mini):
    recipe, folder, clips = mini
    model, processor = load_model(folder, "bfloat16", torch.device("cuda")), load_processor(folder)
    states = encode_clips(model, processor, clips, 32)
    prompter, eos = Prompter(processor, recipe.task), family_of(model).end_tokens(model, processor)
    prompts = [embed_prompt(model, prompter, s, language) for s in states for language in ("de", "zh")]
    return model, prompts, Stepper(PackedDecoder(model), eos)


def test_bfloat16_is_close_to_generate(mini):
    """128 translations of very different length, so that entries are packed several times."""
    model, prompts, stepper = in_bfloat16(mini)
    ours = greedy(stepper, prompts, [64] * len(prompts), 128)
    theirs = [model.generate(inputs_embeds=p[None], max_new_tokens=64, do_sample=False)[0].tolist() for p in prompts]
    assert len({len(tokens) for tokens in ours}) > 10
    assert sum(a == b for a, b in zip(ours, theirs)) >= 0.9 * len(prompts)
    one_by_one = [greedy(stepper, [p], [64], 1)[0] for p in prompts]
    assert sum(a == b for a, b in zip(ours, one_by_one)) >= 0.9 * len(prompts)


def test_bfloat16_candidates_together(mini):
    _, prompts, stepper = in_bfloat16(mini)
    layers, limits = range(len(stepper.decoder.layers)), [64] * len(prompts)
    parent = greedy(stepper, prompts, limits, 128)
    traced = trace(stepper.decoder, prompts, parent, limits, layers, layers)
    together = translate_without(stepper, traced, [3, 5, 8])
    for gone, found in zip([3, 5, 8], together):
        anew = greedy(stepper, prompts, limits, 128, [i for i in layers if i != gone])
        assert sum(a == b for a, b in zip(found, anew)) >= 0.9 * len(prompts)
        assert found != parent


def test_bfloat16_parts_in_fewer_bits(mini):
    """Rounded in place under graphs that were captured before, and two batches together: as decoding anew."""
    model, prompts, stepper = in_bfloat16(mini)
    number = len(stepper.decoder.layers)
    layers, limits, half = range(number), [64] * len(prompts), len(prompts) // 2
    towers = {"decoder": [*layers], "encoder": [*range(len(model.model.audio_tower.layers))]}
    rounded = RoundedModel(model, towers, QuantizeSettings(scheme="int4", group_size=64, train=None), "bfloat16")
    parent = greedy(stepper, prompts, limits, 128)
    parts = [
        trace(stepper.decoder, prompts[some], parent[some], limits[some], layers, layers)
        for some in (slice(0, half), slice(half, None))
    ]
    blocks = {
        f"decoder.{layer}.{block}": layer
        for layer, block in ((1, "mlp"), (number // 2, "attention"), (number - 2, "mlp"))
    }
    for part, layer in {**blocks, "lm_head": number - 1, "embeddings": number - 1}.items():
        with rounded.tried(part, 2):
            traced = Trace.together(parts)
            if part == "embeddings":
                traced = trace(stepper.decoder, prompts, parent, limits, layers, [layer])
            found = translate_changed(stepper, traced, layer)
            stepper.release()
            anew = greedy(stepper, prompts, limits, 128)
        assert sum(a == b for a, b in zip(found, anew)) >= 0.9 * len(prompts)
        assert found != parent


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(32, 32, 128), (8, 2, 64)])
def test_attention_over_shared_prefixes(heads, kv_heads, size):
    """Against attention over whole rows, in which the prompts are copied to every row; 9 rows, of which the last 3 share nothing."""
    shape = {"device": "cuda", "dtype": torch.bfloat16}
    lengths, capacity = [150, 3, 90], 170
    start = torch.arange(10, dtype=torch.int32, device="cuda") * capacity
    start = torch.cat([start, start[-1:] + torch.tensor([150, 153, 243], device="cuda").int()])
    keys, values = torch.randn(1800, kv_heads, size, **shape), torch.randn(1800, kv_heads, size, **shape)
    slots = Slots([keys], [values], start, capacity, True)
    used = torch.tensor([lengths[row % 3] + 1 + row for row in range(9)], dtype=torch.int32, device="cuda")
    shared = SharedPrefixes(1, 9, 4, torch.device("cuda"))
    shared.load(Prefixes(lengths, [0, 1, 2] * 3, [1] * 6 + [0] * 3), range(9), slots)
    shared.plan(start[:9])
    shared.begin(used)
    query = torch.randn(9, heads, size, **shape)
    got = shared.attend(0, query.clone(), keys, values, slots)
    whole_keys, whole_values = keys.clone(), values.clone()
    for row in range(6):
        for whole, tensor in ((whole_keys, keys), (whole_values, values)):
            prompt = int(start[9 + row % 3])
            whole[row * capacity : row * capacity + lengths[row % 3]] = tensor[prompt : prompt + lengths[row % 3]]
    each = torch.arange(10, dtype=torch.int32, device="cuda")
    expected, _ = flash_attention(
        query, whole_keys, whole_values, each, start[:10], 1, capacity, causal=False, used=used
    )
    # Each of the two parts is rounded before they are joined: a unit of the last place for values up to 1.
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=2**-7)


@pytest.mark.parametrize("scale", [1e-2, 1e-5, 1e-6])
def test_small_steps_are_not_rounded_away(scale):
    """100 steps of 1e-5 in one direction, in bfloat16; gradients as large as may be, and smaller than most of 8 billion are."""
    pytest.importorskip("flashoptim")
    start = (torch.randn(512, 64, device="cuda") * 0.02).bfloat16()
    gradient = (torch.randn(512, 64, device="cuda") * scale).bfloat16()
    settings = TrainSettings(optimizer="flash_adamw", learning_rate=1e-5)
    moved = []
    for kind, arguments in (
        flash_adamw(torch.nn.Linear(2, 2).bfloat16().cuda(), settings),
        (torch.optim.AdamW, {"lr": 1e-5}),
    ):
        weight = torch.nn.Parameter(start.clone())
        optimizer = kind([weight], weight_decay=0.0, **arguments)
        for _ in range(100):
            weight.grad = gradient.clone()
            optimizer.step()
        moved.append(((start - weight.detach()).float() * gradient.float().sign()).mean().item())
    assert moved[0] == pytest.approx(1e-3, rel=0.25)
    assert moved[1] < 0.5e-3


def test_flash_adamw_resumes(make_model, processor, split, shared, task, tmp_path, killed_in_step):
    """A run that was stopped ends where one without a stop does, but for the order of sums in the backward pass."""
    pytest.importorskip("flashoptim")
    examples = [
        Example(i, c.id, lang, c.references[lang]) for i, c in enumerate(split.clips) for lang in task.target_languages
    ]
    settings = TrainSettings(
        max_steps=30, learning_rate=1e-3, lr_scheduler="constant", save_steps=20, optimizer="flash_adamw"
    )

    def movement(folder):
        model = make_model(layers=2).to("cuda", torch.bfloat16)
        before = {name: weight.detach().float().clone() for name, weight in model.named_parameters()}
        train_(model, processor, TrainingData(split.clips, examples), shared, settings, tmp_path / folder)
        return torch.cat([(p.detach().float() - before[n]).flatten() for n, p in model.named_parameters()])

    straight = movement("straight")
    with killed_in_step(25):
        movement("stopped")
    resumed = movement("stopped")
    assert straight.abs().mean() > 0
    assert (resumed - straight).abs().mean() < 0.1 * straight.abs().mean()


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("num_bits", [2, 3, 4, 8])
def test_packed_layers_on_every_kernel(group, num_bits):
    """PyTorch's kernel and humming-kernels, where it is installed, against float64, for few tokens and many; 8-bit rows as well."""
    cases = [(512, 384, True), (1024, 256, False)]
    for rows, width, bias in cases:
        words, scale, bias_ = drawn(rows, width, group, torch.bfloat16, bias, num_bits)
        words, scale = words.cuda(), scale.cuda()
        bias_ = bias_.cuda() if bias else None
        plain = PackedLinear(words, scale, bias_, num_bits)
        weight = (plain.integers().double() - 2 ** (num_bits - 1)).view(rows, -1, group) * scale.double()[..., None]
        layers = [plain]
        if TorchLinear.fits(words, scale, num_bits):
            layers.append(TorchLinear(words, scale, bias_, num_bits))
            assert torch.equal(layers[0].unpacked(), layers[1].unpacked())
        if humming_layers.fits(rows, width, scale):
            layers.append(humming_layers.HummingLinear(words.clone(), scale, bias_, num_bits))
        for num_tokens in (1, 8, 9, 33, 64, 65, 300, 2000):
            tokens = torch.randn(num_tokens, width, device="cuda").bfloat16()
            expected = tokens.double() @ weight.view(rows, width).T + (bias_.double() if bias else 0)
            for layer in layers:
                error = (layer(tokens).double() - expected).norm() / expected.norm()
                assert error < 0.01, (type(layer).__name__, num_tokens, error)
    integers = torch.randint(-127, 128, (2048, 256), dtype=torch.int8, device="cuda")
    scale = (0.01 * torch.rand(2048, 1, device="cuda")).bfloat16()
    tokens = torch.randn(9, 256, device="cuda").bfloat16()
    expected = tokens.double() @ (integers.double() * scale.double()).T
    for head in (EightBitLinear(integers, scale), head_of(integers.clone(), scale)):
        assert (head(tokens).double() - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize(
    "bits",
    [{}, {"decoder.2.mlp": 3, "decoder.4.mlp": 3, "decoder.1.attention": 8, "embeddings": 4, "lm_head": 4}],
)
def test_packed_weights_translate_as_unpacked_ones(mini, tmp_path, bits):
    """With graphs: nearly all of them, because sums are rounded elsewhere."""
    recipe, folder, clips = mini
    processor, gpu = load_processor(folder), torch.device("cuda")
    rows = [] if bits else ["embeddings", "lm_head"]
    asked = QuantizeSettings(scheme="int4", group_size=64, eight_bit=rows, bits=bits)
    save_packed(load_model(folder, "float32", torch.device("cpu")), processor, tmp_path, asked, "bfloat16")
    said = [
        translate_clips(
            load_model(tmp_path, "bfloat16", gpu, keep_packed=kept), processor, recipe.task, clips, recipe.decode
        )
        for kept in (True, False)
    ]
    equal = sum(a == b for a, b in zip(*said))
    print(f"{equal} of {len(said[0])} translations equal")
    assert equal >= 0.8 * len(said[0])
