"""What each operator does to channels, shown on tiny networks that are pruned and compared with their masked twins."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.network import trace
from autoprune.network.graph.rules.table import OPERATORS, operator_name

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Head(nn.Module):
    """Pools what `body` makes of the input and classifies it."""

    def __init__(self, body, width, classes=5):
        super().__init__()
        self.body, self.fc = body, nn.Linear(width, classes)

    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))


class Wired(nn.Module):
    """Modules by name and a function that wires them."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.wiring = forward

    def forward(self, *inputs):
        return self.wiring(self, *inputs)


def sizes(network):
    return {group.name: group.size for group in network.groups}


def reason(network, name):
    return next(f.reason for f in network.frozen if f.name == name)


def conv(a, b, k=3, **options):
    return nn.Conv2d(a, b, k, padding=options.pop("padding", k // 2), **options)


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_every_rank_are_pruned(exact, rank):
    make, norm = getattr(nn, f"Conv{rank}d"), getattr(nn, f"BatchNorm{rank}d")
    pool = getattr(nn, f"AdaptiveAvgPool{rank}d")(1)
    body = nn.Sequential(make(2, 8, 3), norm(8), nn.ReLU(), make(8, 6, 3, stride=2), nn.ReLU(), pool, nn.Flatten())
    x = torch.randn(2, 2, *[9] * rank)
    assert sizes(exact(nn.Sequential(body, nn.Linear(6, 3)), x)) == {"0.0": 8, "0.3": 6}


def test_linear_layers_are_pruned_and_the_output_stays(exact):
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    network = exact(model, X[:, 0])
    assert sizes(network) == {"0": 16, "2": 12}
    assert reason(network, "4") == "the model's output"


def test_a_linear_layer_after_flatten_knows_the_channel_of_every_pixel(exact):
    network = exact(nn.Sequential(conv(3, 8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 5)), X)
    assert sizes(network) == {"0": 8}
    assert network.index_map["3.weight"][1].tolist() == [c for c in range(8) for _ in range(64)]


def test_flattening_with_channels_last_repeats_the_channels_instead(exact):
    model = Wired(lambda m, x: m.fc(m.conv(x).permute(0, 2, 3, 1).flatten(1)), conv=conv(3, 8), fc=nn.Linear(8 * 64, 5))
    network = exact(model, X)
    assert network.index_map["fc.weight"][1].tolist() == list(range(8)) * 64


def test_the_groups_of_a_grouped_convolution_shrink_alike(exact):
    body = nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 8, groups=4), nn.ReLU(), conv(8, 6))
    network = exact(Head(body, 6), X)
    assert sizes(network) == {"body.0": 3, "body.2": 2, "body.4": 6}


def test_a_depthwise_convolution_goes_with_its_input(exact):
    network = exact(Head(nn.Sequential(conv(3, 8), conv(8, 8, groups=8), nn.BatchNorm2d(8), conv(8, 6)), 6), X)
    assert sizes(network) == {"body.0": 8, "body.3": 6}
    assert network.group("body.0").producers == ("body.0", "body.1")


def test_a_depthwise_convolution_with_multiplier_two_loses_both_outputs_of_a_channel(exact):
    network = exact(Head(nn.Sequential(conv(3, 8), conv(8, 16, groups=8), conv(16, 6)), 6), X)
    assert sizes(network) == {"body.0": 8, "body.2": 6}
    assert network.index_map["body.1.weight"][0].tolist() == [c for c in range(8) for _ in range(2)]


def test_a_depthwise_convolution_on_the_input_itself_is_frozen(exact):
    network = exact(Head(nn.Sequential(conv(3, 6, groups=3), conv(6, 8)), 8), X)
    assert sizes(network) == {"body.1": 8}


def test_a_convolution_with_one_input_channel_is_no_depthwise_one(exact):
    body = nn.Sequential(conv(1, 8), conv(8, 6))
    assert sizes(exact(Head(body, 6), X[:, :1].contiguous())) == {"body.0": 8, "body.1": 6}


def test_a_convolution_with_one_output_channel_is_no_depthwise_one(exact):
    model = Wired(
        lambda m, x: m.fc((m.a(x) * torch.sigmoid(m.gate(m.a(x)))).mean((2, 3))),
        a=conv(3, 8),
        gate=conv(8, 1),
        fc=nn.Linear(8, 5),
    )
    network = exact(model, X)
    assert sizes(network) == {"a": 8}
    assert {"gate", "fc"} == set(network.group("a").consumers)


@pytest.mark.parametrize("factor", [2, 3])
def test_outputs_that_are_a_multiple_of_the_inputs_make_no_depthwise_convolution(exact, factor):
    network = exact(Head(nn.Sequential(conv(3, 4), conv(4, 4 * factor), conv(4 * factor, 6)), 6), X)
    assert sizes(network) == {"body.0": 4, "body.1": 4 * factor, "body.2": 6}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_transposed_convolutions_are_pruned(exact, rank):
    make, back = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
    model = nn.Sequential(make(2, 8, 3), nn.ReLU(), back(8, 6, 2, stride=2), nn.ReLU(), make(6, 2, 1))
    assert sizes(exact(model, torch.randn(2, 2, *[5] * rank))) == {"0": 8, "2": 6}


@pytest.mark.parametrize(("groups", "outputs"), [(4, 8), (2, 4), (2, 12)])
def test_the_groups_of_a_grouped_transposed_convolution_shrink_alike(exact, groups, outputs):
    body = nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, outputs, 2, stride=2, groups=groups), conv(outputs, 6))
    network = exact(Head(body, 6), X)
    assert sizes(network) == {"body.0": 8 // groups, "body.1": outputs // groups, "body.2": 6}


def test_a_depthwise_transposed_convolution_goes_with_its_input(exact):
    body = nn.Sequential(conv(3, 8), nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8), nn.BatchNorm2d(8), conv(8, 6))
    network = exact(Head(body, 6), X)
    assert sizes(network) == {"body.0": 8, "body.3": 6}


def test_padding_given_as_a_word_and_other_padding_modes_are_followed(exact):
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1, padding_mode="reflect")
    )
    assert sizes(exact(Head(body, 6), X)) == {"body.0": 8, "body.2": 6}


def test_an_embedding_loses_columns_and_keeps_its_vocabulary(exact):
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    network = exact(model, torch.randint(0, 11, (2, 4)))
    assert sizes(network) == {"0": 8, "1": 6}
    assert list(network.index_map["0.weight"]) == [1]


# --- normalisations and activations -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}], ids=str)
def test_batch_norms_follow_their_channels(exact, options):
    body = nn.Sequential(conv(3, 8, bias=False), nn.BatchNorm2d(8, **options), nn.ReLU(), conv(8, 6))
    assert sizes(exact(Head(body, 6), X)) == {"body.0": 8, "body.3": 6}


# torch warns about `num_features` of an instance norm without weights, although it does not use it.
@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features")
@pytest.mark.parametrize("options", [{}, {"affine": True}, {"track_running_stats": True}], ids=str)
def test_instance_norms_follow_their_channels(exact, options):
    body = nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8, **options), nn.ReLU(), conv(8, 6))
    network = exact(Head(body, 6), X)
    assert sizes(network) == {"body.0": 8, "body.3": 6}


def test_a_layer_norm_over_the_channels_marks_them_approximate(exact):
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    network = exact(model, X[:, 0], twin=False)
    assert network.group("0").approximate == "the LayerNorm 1 averages over these channels"


def test_a_group_norm_keeps_its_groups_equal_and_is_approximate(exact):
    network = exact(Head(nn.Sequential(conv(3, 12), nn.GroupNorm(3, 12), nn.ReLU(), conv(12, 6)), 6), X, twin=False)
    assert sizes(network) == {"body.0": 4, "body.3": 6}
    assert network.group("body.0").approximate == "the GroupNorm body.1 averages over these channels"
    assert network.group("body.3").approximate is None


@pytest.mark.parametrize("slopes", [1, 8])
def test_prelu_with_one_slope_or_one_a_channel(exact, slopes):
    body = nn.Sequential(conv(3, 8), nn.PReLU(slopes), conv(8, 6))
    network = exact(Head(body, 6), X)
    assert sizes(network) == {"body.0": 8, "body.2": 6}
    assert ("body.1.weight" in network.index_map) == (slopes == 8)


@pytest.mark.parametrize(
    "activation",
    [nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(), nn.Mish(), nn.Softplus(), nn.ReLU6()],
    ids=lambda m: type(m).__name__,
)
def test_activations_leave_channels_alone(exact, activation):
    network = exact(Head(nn.Sequential(conv(3, 8), activation, conv(8, 6)), 6), X)
    assert sizes(network) == {"body.0": 8, "body.2": 6}


@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.AdaptiveMaxPool2d(2),
        nn.Upsample(scale_factor=2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.ZeroPad2d(1),
        nn.ReflectionPad2d(1),
    ],
    ids=lambda m: str(m),
)
def test_pooling_resizing_and_spatial_padding_leave_channels_alone(exact, pool):
    network = exact(Head(nn.Sequential(conv(3, 8), pool, conv(8, 6)), 6), X)
    assert sizes(network) == {"body.0": 8, "body.2": 6}


# --- wiring -------------------------------------------------------------------------------------------------------


def test_a_residual_sum_joins_its_branches(exact):
    model = Wired(
        lambda m, x: m.fc((m.a(x) + m.c(F.relu(m.b(m.a(x))))).mean((2, 3))),
        a=conv(3, 8),
        b=conv(8, 6),
        c=conv(6, 8),
        fc=nn.Linear(8, 5),
    )
    network = exact(model, X)
    assert sizes(network) == {"a": 8, "b": 6}
    assert network.group("a").producers == ("a", "c")


@pytest.mark.parametrize(
    "add",
    [lambda a, b: torch.add(input=a, other=b), lambda a, b: torch.add(a, other=b), lambda a, b: a.clone().add_(b)],
    ids=["both by name", "one by name", "in place"],
)
def test_a_sum_joins_its_branches_however_it_is_written(exact, add):
    model = Wired(lambda m, x: m.fc(add(m.a(x), m.b(x)).mean((2, 3))), a=conv(3, 8), b=conv(3, 8), fc=nn.Linear(8, 5))
    network = exact(model, X)
    assert network.group("a").producers == ("a", "b")


@pytest.mark.parametrize(
    "cat", [lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat(tensors=(a, b), dim=-3)], ids=["cat", "by name"]
)
def test_a_concatenation_lines_channels_up(exact, cat):
    model = Wired(
        lambda m, x: m.fc(m.c(cat(m.a(x), m.b(x))).mean((2, 3))),
        a=conv(3, 4),
        b=conv(3, 6),
        c=conv(10, 8),
        fc=nn.Linear(8, 5),
    )
    network = exact(model, X)
    assert sizes(network) == {"a": 4, "b": 6, "c": 8}
    assert network.index_map["c.weight"][1].tolist() == list(range(10))


def test_a_concatenation_with_the_input_keeps_the_input(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(torch.cat([m.a(x), x], 1)).mean((2, 3))),
        a=conv(3, 4),
        b=conv(7, 8),
        fc=nn.Linear(8, 5),
    )
    network = exact(model, X)
    assert (network.index_map["b.weight"][1] < 0).tolist() == [False] * 4 + [True] * 3


def shuffled(x, groups):
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


def test_a_channel_shuffle_is_followed(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(shuffled(m.a(x), 2)).mean((2, 3))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 5)
    )
    network = exact(model, X)
    assert sizes(network) == {"a": 4, "b": 6}
    assert network.index_map["b.weight"][1].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_squeeze_and_excitation_block_gates_the_channels_it_reads(exact):
    model = Wired(
        lambda m, x: m.fc((m.a(x) * torch.sigmoid(m.up(F.relu(m.down(m.pool(m.a(x))))))).mean((2, 3))),
        a=conv(3, 8),
        pool=nn.AdaptiveAvgPool2d(1),
        down=conv(8, 4, 1),
        up=conv(4, 8, 1),
        fc=nn.Linear(8, 5),
    )
    network = exact(model, X)
    assert sizes(network) == {"a": 8, "down": 4}
    assert set(network.group("a").producers) == {"a", "up"}


def test_a_gate_that_is_written_with_linear_layers_and_expand_is_followed_too(exact):
    def wiring(m, x):
        y = m.a(x)
        gate = torch.sigmoid(m.up(F.relu(m.down(y.mean((2, 3))))))
        return m.fc((y * gate.view(y.shape[0], y.shape[1], 1, 1).expand_as(y)).mean((2, 3)))

    model = Wired(wiring, a=conv(3, 8), down=nn.Linear(8, 4), up=nn.Linear(4, 8), fc=nn.Linear(8, 5))
    assert sizes(exact(model, X)) == {"a": 8, "down": 4}


@pytest.mark.parametrize(
    "halve",
    [lambda x: x.chunk(2, 1), lambda x: x.split(x.shape[1] // 2, 1), lambda x: torch.chunk(x, chunks=2, dim=-3)],
    ids=["chunk", "split", "by name"],
)
def test_the_parts_of_a_chunk_shrink_alike(exact, halve):
    def wiring(m, x):
        a, b = halve(m.a(x))
        return m.fc(m.b(torch.cat([a * 2, torch.sigmoid(b)], 1)).mean((2, 3)))

    network = exact(Wired(wiring, a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 5)), X)
    assert sizes(network) == {"a": 4, "b": 6}


def test_the_sizes_of_unequal_parts_follow(exact):
    def wiring(m, x):
        a, b = m.a(x).split([3, 5], 1)
        return m.fc(m.c(torch.cat([b, a], 1)).mean((2, 3)))

    network = exact(Wired(wiring, a=conv(3, 8), c=conv(8, 6), fc=nn.Linear(6, 5)), X)
    assert sizes(network) == {"a": 8, "c": 6}


def test_a_chunk_into_unequal_parts_freezes_the_channels():
    def wiring(m, x):
        a, b, c = m.a(x).chunk(3, 1)
        return m.fc(m.c(torch.cat([c, b, a], 1)).mean((2, 3)))

    network = trace(Wired(wiring, a=conv(3, 8), c=conv(8, 6), fc=nn.Linear(6, 5)), X)
    assert sizes(network) == {"c": 6}
    assert "parts of fixed, unequal width" in reason(network, "a")


def test_a_slice_by_constants_freezes_the_channels(exact):
    model = Wired(lambda m, x: m.fc(m.b(m.a(x)[:, 2:6]).mean((2, 3))), a=conv(3, 8), b=conv(4, 6), fc=nn.Linear(6, 5))
    network = exact(model, X)
    # What lies before the last bound must stay in its place; what lies behind it is read by nobody and may go.
    assert sizes(network) == {"a": 2, "b": 6}
    assert network.index_map["a.weight"][0].tolist() == [-1] * 6 + [0, 1]


@pytest.mark.parametrize("cut", [lambda x: x[:, 3:], lambda x: x.narrow(1, 3, 5)], ids=["slice", "narrow"])
def test_the_end_of_a_slice_without_an_end_may_shrink_unless_its_length_is_written_down(cut):
    model = Wired(lambda m, x: m.fc(m.b(cut(m.a(x))).mean((2, 3))), a=conv(3, 8), b=conv(5, 6), fc=nn.Linear(6, 5))
    network = trace(model, X)
    assert sizes(network)["b"] == 6
    assert sizes(network).get("a", 0) == (5 if "narrow" not in cut.__code__.co_names else 0)


def test_a_slice_that_counts_from_the_end_keeps_the_end(exact):
    model = Wired(lambda m, x: m.fc(m.b(m.a(x)[:, -4:]).mean((2, 3))), a=conv(3, 8), b=conv(4, 6), fc=nn.Linear(6, 5))
    network = exact(model, X)
    assert network.index_map["a.weight"][0].tolist() == [0, 1, 2, 3] + [-1] * 4


def test_a_slice_of_space_leaves_channels_alone(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(m.a(x)[:, :, ::2, 1:]).mean((2, 3))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 5)
    )
    assert sizes(exact(model, X)) == {"a": 8, "b": 6}


def test_picking_one_channel_by_number_freezes_the_channels(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(x).mean((2, 3))) + m.a(x)[:, 3].mean(), a=conv(3, 8), b=conv(3, 6), fc=nn.Linear(6, 5)
    )
    network = exact(model, X)
    assert sizes(network) == {"b": 6}
    assert reason(network, "a").startswith("a single channel is picked by its number")


def test_a_literal_pad_along_channels_freezes_all_that_is_added_to_it_and_names_the_pad(exact):
    """The zero-padded shortcut: upstream, downstream and the layers added to it all tell the pad."""

    def wiring(m, x):
        y = m.stem(x)
        y = F.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)) + m.conv2(F.relu(m.conv1(y)))
        return m.fc((y + m.conv4(F.relu(m.conv3(y)))).mean((2, 3)))

    network = exact(
        Wired(
            wiring,
            stem=conv(3, 4),
            conv1=conv(4, 6, stride=2),
            conv2=conv(6, 8),
            conv3=conv(8, 6),
            conv4=conv(6, 8),
            fc=nn.Linear(8, 5),
        ),
        X,
    )
    assert sizes(network) == {"conv1": 6, "conv3": 6}
    for name in ("stem", "conv2", "conv4"):
        assert reason(network, name).startswith("padded along channels by a constant"), name


def test_zeros_concatenated_by_a_literal_width_are_told_another_one(exact):
    def wiring(m, x):
        y = m.a(x)
        wide = torch.cat([y, torch.zeros(y.shape[0], 4, *y.shape[2:])], 1)
        return m.fc((wide + m.b(x)).mean((2, 3)))

    network = exact(Wired(wiring, a=conv(3, 4), b=conv(3, 8), fc=nn.Linear(8, 5)), X)
    # The channels of `a` are joined with the first four of `b`; the other four are added to zeros that follow.
    assert sizes(network) == {"a": 4, "b": 4}
    assert network.group("a").producers == ("a", "b")
    assert network.group("b").producers == ("b",)


def test_a_module_that_is_called_twice_is_one_layer_with_twice_the_macs(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(F.relu(m.b(F.relu(m.a(x))))).mean((2, 3))), a=conv(3, 8), b=conv(8, 8), fc=nn.Linear(8, 5)
    )
    network = exact(model, X)
    assert sizes(network) == {"a": 8}
    assert network.group("a").producers == ("a", "b")


def test_tied_weights_shrink_together_and_count_once(exact):
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    model = nn.Sequential(nn.Linear(6, 8), a, nn.ReLU(), b, nn.ReLU(), nn.Linear(8, 3))
    network = exact(model, torch.randn(2, 6))
    assert sizes(network) == {"0": 8}
    assert set(network.group("0").producers) >= {"0", "1"}


def test_tied_weights_stay_tied_after_surgery(exact, pruned):
    x = torch.randn(2, 6)
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight
    network = trace(nn.Sequential(nn.Linear(6, 8), a, nn.ReLU(), b, nn.ReLU(), nn.Linear(8, 3)), x)
    small = pruned(network, x)
    assert small[1].weight is small[3].weight
    assert small[1].weight.shape == (4, 4)


def test_a_flip_and_a_repeat_of_channels_are_followed(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(m.a(x).flip(1).repeat(1, 2, 1, 1)).mean((2, 3))),
        a=conv(3, 4),
        b=conv(8, 6),
        fc=nn.Linear(6, 5),
    )
    network = exact(model, X)
    # Units are numbered in the order of the first parameter that holds them.
    assert network.index_map["b.weight"][1].tolist() == [3, 2, 1, 0, 3, 2, 1, 0]


def test_a_mean_over_channels_freezes_them(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(x).mean((2, 3))) + m.a(x).mean(1).mean(), a=conv(3, 8), b=conv(3, 6), fc=nn.Linear(6, 5)
    )
    network = exact(model, X)
    assert sizes(network) == {"b": 6}
    assert reason(network, "a").startswith("reduced over channels")


def test_a_softmax_over_channels_freezes_them(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(m.a(x).softmax(1)).mean((2, 3))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 5)
    )
    network = exact(model, X)
    assert sizes(network) == {"b": 6}
    assert reason(network, "a").startswith("normalised over channels")


def test_a_weight_that_is_scaled_on_the_way_is_pruned_like_a_stored_one(exact):
    model = Wired(
        lambda m, x: m.fc(F.conv2d(m.a(x), m.b.weight * 2, padding=1).mean((2, 3))),
        a=conv(3, 8),
        b=conv(8, 6, bias=False),
        fc=nn.Linear(6, 5),
    )
    assert sizes(exact(model, X)) == {"a": 8, "b": 6}


def test_a_weight_that_is_put_together_out_of_two_is_never_pruned_wrongly(pruned):
    def wiring(m, x):
        return m.fc(F.conv2d(m.a(x), torch.cat([m.b.weight, m.c.weight], 2)[:, :, :3], padding=1).mean((2, 3)))

    model = Wired(wiring, a=conv(3, 8), b=conv(8, 6, bias=False), c=conv(8, 6, bias=False), fc=nn.Linear(6, 5))
    network = trace(model, X)
    assert network.notes == ()
    pruned(network, X)


def test_an_operator_without_a_rule_freezes_what_it_reads_and_is_named(exact):
    model = Wired(
        lambda m, x: m.fc(m.b(torch.sort(m.a(x), 1)[0]).mean((2, 3))), a=conv(3, 8), b=conv(8, 6), fc=nn.Linear(6, 5)
    )
    network = exact(model, X)
    assert sizes(network) == {"b": 6}
    assert "no rule for the operator aten.sort.default" in reason(network, "a")
    assert network.notes == ("no rule for the operator aten.sort.default: what it reads is frozen",)


def test_a_buffer_as_wide_as_the_channels_follows_them(exact):
    model = Wired(lambda m, x: m.fc((m.a(x) * m.scale).mean((2, 3))), a=conv(3, 8), fc=nn.Linear(8, 5))
    model.register_buffer("scale", torch.rand(8, 1, 1) + 0.5)
    assert sizes(exact(model, X)) == {"a": 8}


def test_a_constant_tensor_as_wide_as_the_channels_freezes_them(exact):
    constant = torch.rand(8, 1, 1) + 0.5
    model = Wired(
        lambda m, x: m.fc((m.a(x) * constant).mean((2, 3))) + m.fc2(m.b(x).mean((2, 3))),
        a=conv(3, 8),
        b=conv(3, 6),
        fc=nn.Linear(8, 5),
        fc2=nn.Linear(6, 5),
    )
    network = trace(model, X)
    assert sizes(network) == {"b": 6}
    assert "a tensor of fixed width" in reason(network, "a")


def test_a_scale_parameter_of_a_block_follows_its_channels(exact):
    model = Wired(lambda m, x: m.fc((m.a(x) * m.gamma).mean((2, 3))), a=conv(3, 8), fc=nn.Linear(8, 5))
    model.gamma = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
    assert sizes(exact(model, X)) == {"a": 8}


def test_attention_between_tokens_keeps_the_contracted_channels_together(exact):
    """Queries and keys are contracted with each other: their channels live and die together."""

    def wiring(m, x):
        q, k, v = m.q(x), m.k(x), m.v(x)
        return m.out((q @ k.transpose(1, 2)).softmax(-1) @ v)

    model = Wired(wiring, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 10), out=nn.Linear(10, 3))
    network = trace(model, torch.randn(2, 4, 6))
    assert "v" in sizes(network)


def test_operator_names_drop_namespace_overload_and_the_mark_of_writing_in_place():
    assert operator_name(torch.ops.aten.relu_.default) == "relu"
    assert operator_name(torch.ops.aten.add.Tensor) == "add"
    assert operator_name(torch.ops.aten._to_copy.default) == "_to_copy"


def test_every_rule_is_a_function_and_is_named_as_operators_are():
    assert all(callable(known.rule) for known in OPERATORS.values())
    assert not any(name.endswith("_") or "." in name or ":" in name for name in OPERATORS)
