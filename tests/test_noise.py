"""Philox against known answers and a scalar twin, the layout of the draws, their statistics, and the clock."""

import copy
import itertools
import math

import pytest
import timm
import torch
from torch import nn

from quantization import build_recipe, convert_linears
from quantization.layers.clock import NoiseClock
from quantization.noise import Noise, philox4x32, uniform

ONES = 0xFFFFFFFF
# Random123, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, answer.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def scalar_philox(counter, key):
    """Philox4x32-10 in Python integers, from the paper of Salmon et al., section 3.3."""
    x, k = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * x[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * x[2], 2**32)
        x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(x)


def scalar_uniform(row, column, seed, rank, stream, position):
    """One draw, by the layout that the docstring of quantization.noise lays down."""
    words = scalar_philox((column // 8, row, stream, position), (seed, rank))
    word = words[(column % 8) // 2]
    bits = word >> 16 if column % 2 else word & 0xFFFF
    return (bits + 0.5) / 65536


def noise(seed=0, rank=0, stream=0, position=0):
    key = rank << 32 | seed
    key -= 2**64 if key >= 2**63 else 0
    return Noise(torch.tensor([key, position << 32], dtype=torch.int64), stream)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers_of_random123(counter, key, answer):
    words = philox4x32(*(tuple(torch.tensor([w]) for w in ws) for ws in (counter, key)))
    assert tuple(w.item() for w in words) == answer
    assert scalar_philox(counter, key) == answer


def test_philox_agrees_with_its_scalar_twin_on_random_counters():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(2**32, (6, 300), generator=g)
    words = torch.stack(philox4x32(tuple(inputs[:4]), tuple(inputs[4:])), dim=1)
    expected = [scalar_philox(column[:4], column[4:]) for column in inputs.t().tolist()]
    assert words.tolist() == [list(e) for e in expected]


@pytest.mark.parametrize("shape", [(1,), (33,), (1, 33), (5, 33), (7, 8), (3, 1), (2, 3, 33), (2, 2, 3, 9)], ids=str)
@pytest.mark.parametrize(
    ("seed", "rank", "stream", "position"), [(0, 0, 0, 0), (ONES, 3, 8 * 47 + 5, 112_499), (1, ONES, 1, ONES)]
)
def test_every_draw_is_that_of_the_documented_layout(shape, seed, rank, stream, position):
    if position >= 2**31:
        state = torch.tensor([noise(seed, rank).state[0].item(), (position << 32) - 2**64], dtype=torch.int64)
        draws = uniform(shape, Noise(state, stream))
    else:
        draws = uniform(shape, noise(seed, rank, stream, position))
    assert draws.shape == shape and draws.dtype == torch.float32
    flat = draws.reshape(-1, shape[-1]).tolist()
    for row, column in itertools.product(range(len(flat)), range(shape[-1])):
        assert flat[row][column] == scalar_uniform(row, column, seed, rank, stream, position)


def test_an_integer_seed_is_64_bits_of_key_and_stream_zero():
    for seed in (0, 1, 2**32 + 5, 2**63 + 1, 2**64 - 1, -1):
        low, high = seed & ONES, (seed >> 32) & ONES
        assert torch.equal(uniform((4, 9), Noise.from_seed(seed)), uniform((4, 9), noise(low, high)))
    assert not torch.equal(uniform((4, 9), Noise.from_seed(1)), uniform((4, 9), Noise.from_seed(1 + 2**32)))


def test_the_draw_of_an_element_does_not_depend_on_the_size_of_its_tensor():
    large = uniform((9, 70), noise(5))
    assert torch.equal(uniform((4, 33), noise(5)), large[:4, :33])
    assert torch.equal(uniform((3, 3, 70), noise(5)), large.view(3, 3, 70))


def test_draws_lie_strictly_between_0_and_1_and_have_16_bits():
    draws = uniform((1024, 1024), noise(7))
    assert draws.min() == 0.5 / 65536 and draws.max() == 65535.5 / 65536
    bits = draws.double() * 65536 - 0.5
    assert torch.equal(bits, bits.round())


def test_every_half_of_every_word_is_uniform_and_so_is_the_whole():
    """Chi-square on the high and the low byte of each of the eight 16-bit halves of a call."""

    def z_of_chi_square(values):
        counts = torch.bincount(values, minlength=256).double()
        expected = counts.sum() / 256
        chi_square = ((counts - expected) ** 2 / expected).sum()
        return ((chi_square - 255) / math.sqrt(2 * 255)).item()

    bits = (uniform((512, 4096), noise(11)).double() * 65536 - 0.5).long().reshape(-1, 8)
    z = [z_of_chi_square(part) for half in bits.unbind(1) for part in (half >> 8, half & 255)]
    assert max(map(abs, z)) < 4.5
    assert abs(z_of_chi_square(bits.flatten() >> 8)) < 4.5
    assert z_of_chi_square((bits[:, 0] | bits[:, 1]) >> 8) > 100  # the control: the test sees a lack of uniformity


def test_streams_that_differ_in_any_coordinate_share_no_call_and_are_uncorrelated():
    coordinates = list(
        itertools.product(
            (0, 1, 2**31), (0, 1, 7), [8 * layer + q for layer in (0, 1, 50) for q in range(6)], (0, 1, 99)
        )
    )
    draws = torch.stack([uniform((8, 256), noise(*c)).flatten() for c in coordinates])
    bits = (draws.double() * 65536).long()
    calls = bits.view(-1, 8)
    assert len(calls.unique(dim=0)) == len(calls)  # no 128-bit output occurs twice anywhere, rows and columns included

    correlation = torch.corrcoef(draws)
    correlation.fill_diagonal_(0)
    assert correlation.abs().max() < 6 / math.sqrt(draws.shape[1])
    again = torch.stack([draws[0], uniform((8, 256), noise(*coordinates[0])).flatten()])
    assert torch.corrcoef(again)[0, 1] > 0.999  # the control: a stream correlates with itself


def test_neighbouring_elements_are_uncorrelated():
    draws = uniform((1024, 1024), noise(3)) - 0.5
    for shift, axis in itertools.product((1, 2, 4, 8, 16, 32), (0, 1)):
        z = (draws * draws.roll(shift, axis)).mean() * 12 * draws.numel() ** 0.5
        assert abs(z) < 4.5


# The clock ------------------------------------------------------------------------------------------------------------

WIDTH = 64


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.b(self.a(x))


def stochastic_model(seed=0, rank=0, names=("a", "b")):
    """Two layers all of whose quantizers are stochastic, so that every product shows its noise."""
    model = TwoLayers()
    convert_linears(model, build_recipe(forward="stochastic"), names=names)
    model.noise.reseed(seed, rank)
    return model


@pytest.fixture
def x():
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(2))


def test_the_clock_advances_once_a_forward_pass_of_the_model(x):
    model = stochastic_model(seed=9, rank=2)
    outputs = []
    for position in range(4):
        outputs.append(model(x))
        assert model.noise.state.tolist() == [2 << 32 | 9, position << 32]
        assert model.noise.next_position.item() == position + 1
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


def test_a_shared_clock_is_counted_once_and_converting_again_adds_no_second_count(x):
    model = stochastic_model()
    convert_linears(model, build_recipe(), names=["a", "b"])
    model(x)
    assert model.noise.next_position.item() == 1


def test_seek_reproduces_a_forward_pass_and_its_gradients(x):
    model = stochastic_model()

    def step():
        model.zero_grad()
        output = model(x)
        output.square().sum().backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters())]

    steps = [step() for _ in range(4)]
    model.noise.seek(2)
    for expected in steps[2:]:
        assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(steps[2], steps[3], strict=True) if a.dim() == 2)


def test_a_fresh_clock_at_a_position_continues_the_run_bit_for_bit(x):
    model = stochastic_model(seed=4)
    outputs = [model(x) for _ in range(3)]
    resumed = stochastic_model(seed=4)
    resumed.noise.seek(2)
    assert torch.equal(resumed(x), outputs[2])
    assert not torch.equal(stochastic_model(seed=4)(x), outputs[2])  # the control: without seek it starts over


def test_seed_and_rank_change_the_noise_and_equal_ones_repeat_it(x):
    outputs = [stochastic_model(seed, rank)(x) for seed, rank in ((0, 0), (1, 0), (0, 1), (1, 1))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))
    assert torch.equal(stochastic_model(1, 1)(x), outputs[3])


def test_layers_with_equal_weights_and_inputs_have_noise_of_their_own(x):
    class Twins(TwoLayers):
        def __init__(self):
            super().__init__()
            self.b.load_state_dict(self.a.state_dict())

        def forward(self, x):
            return self.a(x), self.b(x)

    model = Twins()
    convert_linears(model, build_recipe(forward="stochastic"), names=["a", "b"])
    a, b = model(x)
    assert not torch.equal(a, b)
    nearest = Twins()
    convert_linears(nearest, build_recipe(), names=["a", "b"])
    a, b = nearest(x)
    assert torch.equal(a, b)  # the control: without noise they are equal


def test_the_noise_of_a_layer_does_not_depend_on_which_others_are_converted(x):
    one, both = stochastic_model(names=["b"]), stochastic_model()
    one.noise.advance()
    both.noise.advance()
    assert torch.equal(one.b(x), both.b(x))
    other = stochastic_model(names=["a"])
    other.noise.advance()
    other.a.load_state_dict(both.b.state_dict())
    assert not torch.equal(other.a(x), both.b(x))  # the control: another layer has other noise


def test_a_deep_copy_has_its_own_clock_and_its_layers_use_it(x):
    model = stochastic_model()
    model(x)
    clone = copy.deepcopy(model)
    assert clone.noise is not model.noise
    assert all(layer.noise is clone.noise for layer in (clone.a, clone.b))
    assert all(layer.noise is model.noise for layer in (model.a, model.b))

    first, second = clone(x), clone(x)
    assert (model.noise.next_position.item(), clone.noise.next_position.item()) == (1, 3)
    assert torch.equal(model(x), first)  # both continue at position 1
    assert not torch.equal(first, second)
    clone.noise.reseed(5, 0)
    assert not torch.equal(clone(x), model(x))


def test_the_state_dict_is_that_of_the_plain_model():
    plain = TwoLayers().state_dict()
    quantized = stochastic_model().state_dict()
    assert list(plain) == list(quantized)
    assert all(torch.equal(plain[key], quantized[key]) for key in plain)


def test_a_backward_pass_uses_the_noise_of_its_own_forward_pass(x):
    model = stochastic_model()

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()))

    model.noise.seek(0)
    expected = gradients(model(x).square().sum())
    model.noise.seek(0)
    loss = model(x).square().sum()
    model(x)  # another forward pass in between
    model.noise.reseed(77, 1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(loss), expected, strict=True))
    model.noise.reseed(0, 0)
    model.noise.seek(1)
    other = gradients(model(x).square().sum())
    assert not any(torch.equal(a, b) for a, b in zip(other, expected, strict=True) if a.dim() == 2)


def test_activation_checkpointing_changes_no_bit_of_the_gradients():
    def gradients(checkpointed):
        torch.manual_seed(1)
        model = timm.create_model("deit_tiny_patch16_224", img_size=32, embed_dim=64, depth=2, num_heads=2)
        convert_linears(model, build_recipe(forward="stochastic"))
        model.noise.reseed(0, 0)
        model.set_grad_checkpointing(checkpointed)
        model(torch.ones(2, 3, 32, 32)).square().mean().backward()
        return [p.grad for p in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False), strict=True))


def test_the_clock_takes_seed_and_rank_from_torch_where_not_given(monkeypatch):
    torch.manual_seed(1234)
    clock = NoiseClock()
    assert (clock.seed, clock.rank) == (1234, 0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    assert NoiseClock().rank == 3
    assert NoiseClock(5, 6).state.tolist() == [6 << 32 | 5, 0]
    assert NoiseClock(0, ONES).state.tolist() == [-(2**32), 0]  # the same 64 bits, as a signed integer


@pytest.mark.parametrize(("seed", "rank"), [(-1, 0), (2**32, 0), (0, -1), (0, 2**32)])
def test_seeds_and_ranks_beyond_32_bits_are_refused(seed, rank):
    with pytest.raises(ValueError, match="must lie in"):
        NoiseClock(seed, rank)


def test_printing_shows_seed_and_rank():
    assert "seed=9, rank=2" in str(stochastic_model(9, 2).noise)
