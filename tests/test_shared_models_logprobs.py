"""passes.selected_logprobs: equal to the plain way in value and gradient, and never an array of tokens x vocabulary."""

import weakref

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from shared.models.passes import selected_logprobs
from vqa_sft_grpo.grpo import policy_loss


def chosen(hidden, weight, ids, temperature=1.0, chunk=None, bias=None, suppress=(), entropy=True):
    """selected_logprobs of hidden (B, T, D) and ids (B, T)."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    logp, spread = selected_logprobs(rows, weight, ids.reshape(-1), temperature, bias, suppress, entropy, chunk)
    return logp.view(ids.shape), None if spread is None else spread.view(ids.shape)


def plain_logprobs(hidden, weight, ids, temperature=1.0, bias=None, suppress=()):
    logits = F.linear(hidden, weight, bias) / temperature
    logits[..., list(suppress)] = -torch.inf
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[..., None])[..., 0], torch.special.entr(logp.exp()).sum(-1)


def head(seed=0, b=3, t=7, d=16, vocabulary=53, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=g, dtype=dtype) for shape in ((b, t, d), (vocabulary, d), (vocabulary,))
    )
    return (
        hidden.requires_grad_(),
        weight.requires_grad_(),
        bias.requires_grad_(),
        torch.randint(4, vocabulary, (b, t), generator=g),
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("chunk", "temperature", "suppress"), [(1, 1.0, ()), (4, 0.7, (0, 3)), (21, 1.3, ()), (500, 1.0, (1,))]
)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_selected_logprobs_equal_the_plain_path(with_bias, chunk, temperature, suppress, dtype, atol):
    hidden, weight, bias, ids = head(dtype=dtype)
    inputs = [hidden, weight] + [bias] * with_bias
    outcome = []
    for function, more in ((chosen, {"chunk": chunk}), (plain_logprobs, {})):
        logp, entropy = function(
            hidden, weight, ids, temperature=temperature, bias=bias if with_bias else None, suppress=suppress, **more
        )
        outcome.append(
            (
                logp,
                entropy,
                *torch.autograd.grad((logp * torch.linspace(-1, 2, 21, dtype=dtype).view(3, 7)).sum(), inputs),
            )
        )
    assert outcome[0][0].shape == (3, 7) and not outcome[0][1].requires_grad and outcome[0][0].dtype == dtype
    for ours, plain in zip(*outcome, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=atol)


def test_selected_logprobs_gradcheck_and_finite_differences_of_a_loss_on_top():
    hidden, weight, bias, ids = head(b=2, t=3, d=4, vocabulary=11, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: chosen(h, w, ids, 0.8, 4, b, suppress=(2,))[0], (hidden, weight, bias)
    )
    old = chosen(hidden, weight, ids)[0].detach() + 0.05

    def loss(h):
        logp, entropy = chosen(h, weight, ids, chunk=4)
        return policy_loss(
            logp, old, old - 0.3, torch.tensor([1.0, -1.0]), torch.ones(2, 3), beta=0.2, entropy=entropy
        )[0]

    assert torch.autograd.gradcheck(loss, hidden)


def test_selected_logprobs_does_only_what_is_asked_for():
    hidden, weight, bias, ids = head()
    logp, entropy = chosen(hidden, weight.detach(), ids, entropy=False)
    logp.sum().backward()
    assert entropy is None and hidden.grad is not None and weight.grad is None  # a frozen head, as with LoRA
    with torch.no_grad():
        assert not chosen(hidden, weight, ids)[0].requires_grad
    none = torch.zeros(0, dtype=torch.long)
    empty = hidden.reshape(-1, 16)[:0]
    chosen(empty, weight, none)[0].sum().backward()  # all rollouts masked: nothing, but no error
    assert weight.grad.abs().max() == 0
    suppressed = chosen(hidden, weight, torch.full_like(ids, 2), suppress=(2,))[0]
    assert torch.all(suppressed == -torch.inf)
    for arguments, words in (
        ((hidden, weight, ids[:, :3]), "do not fit"),
        ((hidden, weight[:, :5], ids), "do not fit"),
        ((hidden, weight, ids, 0), "temperature"),
        ((hidden, weight, ids, 1, 0), "chunk"),
    ):
        with pytest.raises(ValueError, match=words):
            chosen(*arguments)


def test_selected_logprobs_in_bfloat16_and_under_autocast():
    hidden, weight, _, ids = (x.detach() for x in head(d=64, vocabulary=211))
    low = (hidden.bfloat16().requires_grad_(), weight.bfloat16().requires_grad_())
    results = []
    for function in (
        chosen,
        lambda h, w, i: (F.linear(h, w).float().log_softmax(-1).gather(-1, i[..., None])[..., 0], None),
    ):
        logp, _ = function(*low, ids)
        results.append((logp, *torch.autograd.grad(logp.sum(), low)))
    assert results[0][0].dtype == torch.float32 and results[0][1].dtype == results[0][2].dtype == torch.bfloat16
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-5)
    for ours, plain in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, plain, rtol=0.02, atol=0.02)  # a step of bfloat16

    expected = chosen(hidden, weight, ids)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = hidden.bfloat16().requires_grad_()  # what a block under autocast hands on
        logp = chosen(h, weight, ids)[0]
        logp.sum().backward()
    assert logp.dtype == torch.float32 and h.grad.dtype == torch.bfloat16
    assert (logp - expected).abs().max() < 0.2
    torch.testing.assert_close(logp, chosen(h.float(), weight, ids)[0], rtol=0, atol=0)


class Allocations(TorchDispatchMode):
    """Every tensor that an operation makes, in forward and backward: the largest, and how many bytes live at once."""

    def __init__(self):
        super().__init__()
        self.largest, self.live, self.peak, self.known = 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_iter(out):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
                self.add(x.untyped_storage())
        return out

    def add(self, storage):
        if storage.data_ptr() not in self.known and storage.nbytes():
            self.known.add(storage.data_ptr())
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage.data_ptr(), storage.nbytes())

    def free(self, address, size):
        self.known.discard(address)
        self.live -= size


def allocations(function, tokens, vocabulary=1000, d=8, frozen=True):
    g = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(tokens, d, generator=g, requires_grad=True),
        torch.randn(vocabulary, d, generator=g, requires_grad=not frozen),
    )
    ids = torch.randint(vocabulary, (tokens,), generator=g)
    with Allocations() as seen:
        logp, entropy = function(hidden, weight, ids)
        logp.sum().backward()
        assert entropy.shape == ids.shape and hidden.grad is not None
    return seen


@pytest.mark.parametrize("frozen", [True, False])
def test_no_array_of_tokens_times_vocabulary_ever_exists(frozen):
    tokens, vocabulary, chunk, d = 300, 1000, 16, 8

    def chunked(hidden, weight, ids):
        return chosen(hidden, weight, ids, chunk=chunk)

    seen = allocations(chunked, tokens, vocabulary, d, frozen)
    assert chunk * vocabulary == seen.largest  # and nothing larger
    whole = 4 * tokens * vocabulary
    rest = 4 * (
        tokens * (2 * d + 8) + (0 if frozen else 4 * vocabulary * d)
    )  # gradients of hidden and head, per-token numbers
    assert seen.peak <= 3 * 4 * chunk * vocabulary + rest < 0.4 * whole
    plain = allocations(plain_logprobs, tokens, vocabulary, d, frozen)
    assert plain.largest == tokens * vocabulary and plain.peak > 2 * whole  # the measurement sees it where it happens

    twice = allocations(chunked, 2 * tokens, vocabulary, d, frozen)
    assert twice.largest == seen.largest and twice.peak - seen.peak <= 4 * tokens * (
        2 * d + 8
    )  # grows by the tokens' own numbers only
