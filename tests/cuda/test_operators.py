"""The operators of csrc/cuda, compiled for the CPU under emulation, against the plain-PyTorch kernels and float64."""

import math

import pytest
import torch

from ffw_fast import philox
from ffw_fast.gates import GateKind
from tests.operator_inputs import adam_inputs, as_doubles, objective_inputs

KINDS = list(GateKind)
ORDERS = (0, 1, 2)  # of the threads: forward, backward, shuffled
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((), (0,), (1,), (7,), (3, 5), (8, 3, 3, 3), (1024,), (1029,))


def random(*shape, seed=0, scale=1.0, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)


def settings(temperature=0.05, number=3, first_element=1 << 33):
    return torch.tensor(temperature), philox.make_draw(-7, number, first_element)


def assert_no_worse(got, torchs, exact, factor=2.0):
    """The error against float64 is at most twice PyTorch's own, but for a few units in the last place."""
    if got.dtype == torch.float64:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-14)
        return
    floor = 4 * torch.finfo(got.dtype).eps * max(1e-30, exact.abs().max().item())
    error = (got.double() - exact).abs().max().item()
    bound = factor * (torchs.double() - exact).abs().max().item() + floor
    assert error <= bound, f"error {error}, PyTorch's own bound {bound}"  # false for NaN


def pair(shape, dtype=torch.float32, scores_dtype=None):
    return random(*shape, seed=1, dtype=dtype), random(*shape, seed=2, scale=0.1, dtype=scores_dtype or torch.float32)


# Gates ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_weight(emulated, defaults, kind, dtype, shape):
    weight, scores = pair(shape, dtype)
    arguments = (weight, scores, *settings(), int(kind))
    got = emulated.gate_weight(*arguments)
    expected = defaults.gate_weight(*arguments)
    assert got.dtype == dtype
    if kind is GateKind.FFW:
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    else:
        assert torch.equal(got, expected)  # masks are the same bits


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 0.7, 1e30])
@pytest.mark.parametrize("kind", [GateKind.BERNOULLI, GateKind.CONCRETE])
def test_sampled_masks_are_the_same_bits_at_every_temperature(emulated, defaults, kind, temperature):
    scores = random(5000, scale=3 * min(temperature, 1.0))
    arguments = (torch.ones(5000), scores, *settings(temperature), int(kind))
    assert torch.equal(emulated.gate_weight(*arguments), defaults.gate_weight(*arguments))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gate_weight_backward(emulated, defaults, kind, dtype, shape):
    weight, scores = pair(shape, dtype)
    grad = random(*shape, seed=3, dtype=dtype)
    got = emulated.gate_weight_backward(grad, weight, scores, *settings(), int(kind))
    assert got.dtype == torch.float32
    expected = defaults.gate_weight_backward(grad, weight, scores, *settings(), int(kind))
    exact = defaults.gate_weight_backward(grad.double(), weight.double(), scores.double(), *settings(), int(kind))
    if got.numel() > 0:
        assert_no_worse(got, expected, exact)


@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.CONCRETE])
@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float64), (torch.float16, torch.float16)])
def test_other_dtypes(emulated, defaults, kind, dtypes):
    weight, scores = pair((5, 7), *dtypes)
    arguments = (weight, scores, *settings(), int(kind))
    torch.testing.assert_close(emulated.gate_weight(*arguments), defaults.gate_weight(*arguments))
    grad = random(5, 7, seed=3, dtype=torch.float32 if dtypes[0] == torch.float16 else torch.float64)
    torch.testing.assert_close(
        emulated.gate_weight_backward(grad, *arguments), defaults.gate_weight_backward(grad, *arguments)
    )


@pytest.mark.parametrize("kind", [GateKind.FFW, GateKind.BERNOULLI])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.transpose(0, 1),
        lambda x: x[:, 1:],
        lambda x: x.flatten()[1:],  # contiguous, off 16 bytes
    ],
)
def test_any_layout(emulated, defaults, kind, change):
    weight, scores = (change(x) for x in pair((6, 5, 3, 3)))
    grad = random(*weight.shape, seed=3)
    arguments = (weight, scores, *settings(), int(kind))
    got, expected = emulated.gate_weight(*arguments), defaults.gate_weight(*arguments)
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(
        emulated.gate_weight_backward(grad, *arguments), defaults.gate_weight_backward(grad, *arguments)
    )


@pytest.mark.slow
def test_more_elements_than_one_pass_of_the_grid_takes(emulated, defaults):
    weight, scores = pair((2048 * 256 * 4 + 1029,))
    arguments = (weight, scores, *settings(), int(GateKind.BERNOULLI))
    assert torch.equal(emulated.gate_weight(*arguments), defaults.gate_weight(*arguments))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": torch.zeros(4)}, r"scores must have the weight's shape \(3,\), got \(4,\)"),
        ({"temperature": torch.zeros(2)}, r"temperature must be one float32, got torch.float32 of shape \(2,\)"),
        ({"draw": torch.zeros(3)}, r"draw must be 3 int64 numbers, got torch.float32 of shape \(3,\)"),
        ({"kind": 4}, "4 is not a valid GateKind"),
    ],
)
def test_errors_say_what_was_expected(emulated, changes, message):
    temperature, draw = settings()
    arguments = {
        "weight": torch.zeros(3),
        "scores": torch.zeros(3),
        "temperature": temperature,
        "draw": draw,
        "kind": 0,
    }
    with pytest.raises((ValueError, RuntimeError), match=message):
        emulated.gate_weight(**arguments | changes)


# Adam ----------------------------------------------------------------------------------------------------------------

ADAM = (0.9, 0.999, 1e-8, 1e-2)  # betas, eps, weight decay


def adam_state(count, dtype, scores_dtype=torch.float32):
    weight, scores = pair((count,), dtype, scores_dtype)
    buffers = [torch.full_like(weight, math.nan), scores, torch.zeros_like(scores), torch.zeros_like(scores)]
    return [*buffers, torch.tensor(0.5, dtype=torch.float64)], weight


def adam_steps(step_, state, weight, kind, steps=3, first_step=1):
    wide = state[1].dtype == torch.float64
    for number in range(first_step, first_step + steps):
        grad = random(weight.numel(), seed=10 + number, dtype=torch.float32).to(weight.dtype)
        temperature, draw = settings(number=number)
        next_temperature, next_draw = settings(temperature=0.045, number=number + 1)
        step = torch.tensor(float(number))
        lr = torch.tensor(1e-3)
        step_(
            *(*state, weight, grad, temperature, next_temperature),
            *(step.double() if wide else step, lr.double() if wide else lr, draw, next_draw, *ADAM, int(kind), True),
        )
    return state


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", WEIGHTS)
@pytest.mark.parametrize("count", [1, 1029, 2051])
@pytest.mark.parametrize("first_step", [1, 5000])
def test_gated_adam_step(emulated, defaults, kind, dtype, count, first_step):
    state, weight = adam_state(count, dtype)
    copies = [[x.clone() for x in state] for _ in range(2)]
    exact = [x.double() for x in copies[1]]
    got = adam_steps(emulated.gated_adam_step_, state, weight, kind, first_step=first_step)
    torchs = adam_steps(defaults.gated_adam_step_, copies[0], weight, kind, first_step=first_step)
    exact = adam_steps(defaults.gated_adam_step_, exact, weight.double(), kind, first_step=first_step)
    for mine, theirs, truth in zip(got[1:4], torchs[1:4], exact[1:4], strict=True):
        assert_no_worse(mine, theirs, truth)
    if kind is GateKind.FFW:
        assert_no_worse(got[0], torchs[0], exact[0])
    else:  # a score at a mask's border may have fallen on either side
        assert (got[0] != torchs[0]).float().mean() <= (0.002 if count > 1 else 0)
    torch.testing.assert_close(got[4], torchs[4], rtol=1e-6, atol=0)


def test_the_gated_weight_belongs_to_the_new_scores(emulated, defaults):
    for kind in KINDS:
        state, weight = adam_state(515, torch.float32)
        adam_steps(emulated.gated_adam_step_, state, weight, kind, steps=1)
        temperature, draw = settings(temperature=0.045, number=2)
        assert torch.equal(state[0], emulated.gate_weight(weight, state[1], temperature, draw, int(kind)))


def test_the_result_does_not_depend_on_the_order_of_threads(emulated):
    results = []
    for order in ORDERS:
        emulated.set(order=order)
        state, weight = adam_state(9000, torch.bfloat16)
        results.append(adam_steps(emulated.gated_adam_step_, state, weight, GateKind.CONCRETE))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_buffers_that_share_memory_are_refused(emulated):
    changed, rest = adam_inputs(32)
    with pytest.raises(ValueError, match="scores and grad share memory"):
        emulated.gated_adam_step_(*changed, rest[0], changed[1], *rest[2:], 0, False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gated_adam_step_with_scores_of_other_dtypes(emulated, defaults, dtype):
    state, weight = adam_state(33, dtype, dtype)
    theirs, exact = [x.clone() for x in state], [x.double().clone() for x in state]
    adam_steps(emulated.gated_adam_step_, state, weight, GateKind.FFW)
    adam_steps(defaults.gated_adam_step_, theirs, weight, GateKind.FFW)
    adam_steps(defaults.gated_adam_step_, exact, weight.double(), GateKind.FFW)
    for a, b, c in zip(state, theirs, exact, strict=True):
        assert a.dtype == b.dtype
        assert_no_worse(a.to(dtype), b.to(dtype), c)


# Heads ---------------------------------------------------------------------------------------------------------------

FITS = {  # samples, width, classes, heads, batch size, epochs, shared memory
    "one head": (53, 100, 10, 1, 20, 3, None),
    "two heads": (53, 37, 10, 2, 20, 3, None),
    "two classes": (20, 64, 2, 1, 7, 3, None),
    "chunks": (270, 5, 3, 2, 270, 2, 20000),
    "features in global memory": (25, 40, 6, 2, 10, 2, 2950),
    "momentum too": (25, 40, 6, 2, 10, 2, 1990),
    "all in global memory": (25, 40, 6, 2, 10, 2, 1200),
}


def fit_arguments(samples, width, classes, heads, batch_size, epochs, dtype=torch.float32, best=math.inf):
    source = torch.Generator().manual_seed(3)
    order = torch.stack([torch.randperm(samples, generator=source) for _ in range(epochs)])
    shapes = ((heads, classes, width), (heads, classes)) * 2
    parameters = [random(*shape, seed=i, scale=0.2, dtype=dtype) for i, shape in enumerate(shapes)]
    plateau = torch.tensor([best, 0, 0], dtype=torch.float64)
    labels = torch.randint(classes, (samples, heads), generator=source)
    features = random(samples, width, seed=9, dtype=dtype)
    return [*parameters, plateau, features, labels, order, batch_size, 0.1, 0.9, 1e-4, 1e-3, 5]


def converted(arguments, dtype):
    """Copies, floats among the parameters and features in another dtype."""
    convert = {torch.float32: dtype}
    return [x.clone().to(convert.get(x.dtype, x.dtype)) if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FITS)
def test_fit_linear_head(emulated, defaults, name, order):
    *sizes, memory = FITS[name]
    emulated.set(order, memory or 163 * 1024)
    mine = fit_arguments(*sizes)
    theirs, exact = converted(mine, torch.float32), converted(mine, torch.float64)
    losses = [fit(*x) for fit, x in ((emulated.fit_linear_head_, mine), (defaults.fit_linear_head_, theirs),
                                     (defaults.fit_linear_head_, exact))]  # fmt: skip
    for a, b, c in zip(mine[:4], theirs[:4], exact[:4], strict=True):
        assert_no_worse(a, b, c)
    torch.testing.assert_close(losses[0], losses[2], rtol=3e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(mine[4], exact[4], rtol=3e-6, atol=0)


def test_fit_linear_head_in_float64(emulated, defaults):
    mine = fit_arguments(30, 40, 5, 2, 8, 2, dtype=torch.float64)
    theirs = [x.clone() if isinstance(x, torch.Tensor) else x for x in mine]
    torch.testing.assert_close(emulated.fit_linear_head_(*mine), defaults.fit_linear_head_(*theirs))
    torch.testing.assert_close(mine[:5], theirs[:5])


@pytest.mark.parametrize("heads", [1, 3])
def test_the_plateau_ends_all_heads_in_the_same_epoch(emulated, defaults, heads):
    mine = fit_arguments(12, 9, 4, heads, 5, 9, best=0.01)
    theirs = converted(mine, torch.float32)
    losses, expected = emulated.fit_linear_head_(*mine), defaults.fit_linear_head_(*theirs)
    assert losses.isfinite().sum() == expected.isfinite().sum() == 6
    assert mine[4].tolist() == pytest.approx([0.01, 6, 1])
    torch.testing.assert_close(losses, expected, rtol=3e-6, atol=0, equal_nan=True)
    torch.testing.assert_close(mine[0], theirs[0])


@pytest.mark.parametrize("plateau", [(0.123456789, 3, 0), (math.inf, 0, 0), (2.5e-3, 17, 1), (math.nan, 1, 0)])
def test_the_plateau_survives_its_passage_through_float(emulated, plateau):
    arguments = fit_arguments(4, 3, 2, 1, 4, 1)
    arguments[4] = torch.tensor(plateau, dtype=torch.float64)
    arguments[-1] = 100
    loss = emulated.fit_linear_head_(*arguments)[0].item()
    if loss <= plateau[0]:
        assert arguments[4].tolist() == [loss, 0, plateau[2]]
    else:
        expected = [float(torch.tensor(plateau[0])), plateau[1] + 1, plateau[2]]
        assert arguments[4].tolist() == pytest.approx(expected, nan_ok=True, rel=0)


@pytest.mark.parametrize("name", ["labels", "order"])
def test_a_number_out_of_range_makes_the_loss_nan(emulated, name):
    arguments = fit_arguments(6, 3, 2, 1, 4, 1)
    arguments[6 if name == "labels" else 7].view(-1)[2] = 99
    assert emulated.fit_linear_head_(*arguments).isnan().all()


def test_no_features(emulated, defaults):
    mine = fit_arguments(25, 0, 6, 2, 10, 2)
    theirs = converted(mine, torch.float32)
    torch.testing.assert_close(emulated.fit_linear_head_(*mine), defaults.fit_linear_head_(*theirs))
    torch.testing.assert_close(mine[:5], theirs[:5])


def test_no_epochs(emulated):
    arguments = fit_arguments(6, 3, 2, 1, 4, 1)
    arguments[7] = arguments[7][:0]
    assert emulated.fit_linear_head_(*arguments).shape == (0,)


# Mutual information --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*WEIGHTS, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 2), (100, 2, 10), (517, 1, 3), (30, 2, 47)])
def test_mutual_information(emulated, defaults, dtype, shape):
    n, heads, classes = shape
    logits = random(*shape, scale=2, dtype=dtype)
    labels = torch.randint(max(1, classes - 1), (n, heads), generator=torch.Generator().manual_seed(1))
    grad = random(heads, seed=4)
    grad = grad.double() if dtype == torch.float64 else grad
    information, joint = emulated.mutual_information(logits, labels)
    their_information, their_joint = defaults.mutual_information(logits, labels)
    exact_information, exact_joint = defaults.mutual_information(logits.double(), labels)
    assert_no_worse(joint, their_joint, exact_joint)
    assert_no_worse(information, their_information, exact_information)
    got = emulated.mutual_information_backward(grad, logits, labels, joint)
    theirs = defaults.mutual_information_backward(grad, logits, labels, their_joint)
    exact = defaults.mutual_information_backward(grad.double(), logits.double(), labels, exact_joint)
    assert got.dtype == dtype
    assert_no_worse(got, theirs, exact)


def test_mutual_information_of_any_layout(emulated, defaults):
    logits, labels = random(2, 40, 5).transpose(0, 1), torch.randint(5, (2, 40)).T
    grad = random(2, seed=4)
    information, joint = emulated.mutual_information(logits, labels)
    torch.testing.assert_close((information, joint), defaults.mutual_information(logits, labels))
    got = emulated.mutual_information_backward(grad, logits, labels, joint)
    expected = defaults.mutual_information_backward(grad, logits, labels, joint)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got, expected)


def test_a_label_out_of_range_makes_the_information_nan(emulated):
    information, _joint = emulated.mutual_information(random(6, 2, 3), torch.tensor([[0, 1]] * 5 + [[3, 1]]))
    assert information.isnan().tolist() == [True, False]


# Objective -----------------------------------------------------------------------------------------------------------

FACTORS = (0.7, 5.0, 0.5)  # alpha, gamma, share
MINIBATCHES = {  # n, targets, heads, classes, and how many KB of shared memory there are
    "one sample": (1, 2, 1, 2, 163),
    "three heads": (37, 4, 3, 2, 163),
    "Multi-Color MNIST": (100, 10, 2, 10, 163),
    "many classes": (100, 64, 2, 64, 163),
    "chunks": (1100, 30, 1, 3, 163),
    "joints in global memory": (60, 5, 2, 47, 12),
}


def assert_objective(kernel, default, inputs):
    """Results of a kernel, which ``inputs`` are for, against the default kernel and float64."""
    results, theirs = kernel(*inputs, *FACTORS), default(*inputs, *FACTORS)
    for got, torchs, exact in zip(results, theirs, default(*as_doubles(inputs), *FACTORS), strict=True):
        assert (got.dtype, got.shape, got.stride()) == (torchs.dtype, torchs.shape, torchs.stride())
        assert_no_worse(got.cpu(), torchs, exact)
    return results


@pytest.mark.parametrize("tables", [False, True])
@pytest.mark.parametrize("dtype", [*WEIGHTS, torch.float64])
@pytest.mark.parametrize("name", MINIBATCHES)
def test_objective(emulated, defaults, name, dtype, tables):
    *sizes, kilobytes = MINIBATCHES[name]
    emulated.set(shared_memory=kilobytes * 1024)
    assert_objective(emulated.objective, defaults.objective, objective_inputs(*sizes, dtype, tables))


def test_objective_does_not_depend_on_the_order_of_threads(emulated):
    inputs = objective_inputs(600, 10, 2, 10, tables=True)
    results = []
    for order in ORDERS:
        emulated.set(order=order)
        results.append(emulated.objective(*inputs, *FACTORS))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_objective_of_any_layout(emulated, defaults):
    logits, labels, head_logits, bias_labels, importance, aligned = objective_inputs(40, 5, 2, 4, tables=True)
    strided = (
        logits.T.contiguous().T,
        labels.repeat_interleave(2)[::2],
        head_logits.transpose(0, 1).contiguous().transpose(0, 1),
        bias_labels.T.contiguous().T,
        importance.double().transpose(0, 2).contiguous().transpose(0, 2),
        aligned.repeat_interleave(2)[::2],
    )
    assert_objective(emulated.objective, defaults.objective, strided)


def test_objective_of_certain_and_of_no_samples(emulated):
    inputs = objective_inputs(40, 3, 1, 3, spread=300.0, tables=True)
    losses, by_logits, _ = emulated.objective(*inputs, 1.0, 1.0, 1.0)
    assert losses.isfinite().all() and losses[1] > 10 and by_logits.isfinite().all()
    inputs[3] = inputs[5][inputs[1]].unsqueeze(1)  # all biases aligned
    losses, _, by_head_logits = emulated.objective(*inputs, 1.0, 1.0, 1.0)
    assert losses[2] == 0 and not by_head_logits.any()


@pytest.mark.parametrize("tables", [False, True])
def test_a_label_out_of_range_makes_the_losses_nan(emulated, tables):
    inputs = objective_inputs(20, 3, 2, 4, tables=tables)
    for index, label in ((1, 3), (1, -1), (3, 4), (3, -1), (3, 1 << 40)):
        wrong = [value if value is None else value.clone() for value in inputs]
        wrong[index].view(-1)[7] = label
        losses, by_logits, by_head_logits = emulated.objective(*wrong, *FACTORS)
        of_task = index == 1
        assert losses[0].isnan() and losses[1 if of_task else 2].isnan()
        assert (by_logits[7] if of_task else by_head_logits[3, 1]).isnan().all()
        assert tables or not losses[2 if of_task else 1].isnan()


def test_objective_refuses_what_does_not_fit(emulated):
    emulated.set(shared_memory=4096)
    with pytest.raises(ValueError, match="objective of 3000 classes and 1 heads of 3 does not fit the shared memory"):
        emulated.objective(*objective_inputs(2, 3000, 1, 3), *FACTORS)
    with pytest.raises(ValueError, match=r"expected logits \(n, C\) and labels \(n,\)"):
        emulated.objective(torch.zeros(2, 3), *objective_inputs(3, 3, 1, 3)[1:], *FACTORS)
