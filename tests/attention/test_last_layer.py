"""What of a packed row the last layer computes; that logprobs and gradients stay the same is in tests/logprobs."""

import pytest
import torch

from grpo_trl.attention.last_layer import reading_completions
from grpo_trl.attention.layout import Layout
from grpo_trl.attention.shared_prefix import serve_shared_prefix
from grpo_trl.rollout.base import RolloutRequest, SamplingOptions
from grpo_trl.rollout.group.engine import GroupEngine
from tests.helpers.families import make_family


LAYOUT = Layout.of([(5, [2, 3]), (1, [1]), (4, [])])
READ = [4, 5, 6, 7, 8, 9, 10, 11, 15]
"""The last token of each prompt, and completions."""


def run(model):
    """The hidden states behind the last layer, and its gated feed-forward's inputs."""
    seen = []
    ids = torch.randint(2, 40, (1, LAYOUT.num_tokens), generator=torch.Generator().manual_seed(0))
    with model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        output = model.model(
            input_ids=ids, position_ids=torch.tensor([LAYOUT.positions]), shared_prefix=LAYOUT, use_cache=False
        )
    return output.last_hidden_state[0], seen[0][0]


@pytest.mark.parametrize("family", ["qwen2", "olmo2", "gemma3"])
def test_the_last_layer_computes_the_tokens_that_predict_something_and_no_others(family):
    model = make_family(family).double()
    with serve_shared_prefix(model):
        hidden, computed = run(model)
    with serve_shared_prefix(model), pytest.MonkeyPatch.context() as patch:
        layer = model.model.layers[-1]
        patch.setattr(layer, "__class__", type(layer).__mro__[1])
        expected, all_tokens = run(model)
    assert len(computed) == len(READ)
    assert len(all_tokens) == LAYOUT.num_tokens
    assert torch.allclose(hidden[READ], expected[READ], atol=1e-12, rtol=0)
    assert torch.allclose(computed, all_tokens[READ], atol=1e-12, rtol=0)


def test_layers_are_what_they_were_afterwards_even_where_they_were_served_twice():
    model = make_family("qwen2")
    kinds = [type(layer) for layer in model.model.layers]
    with reading_completions(model):
        served = [type(layer) for layer in model.model.layers]
        with reading_completions(model):
            assert [type(layer) for layer in model.model.layers] == served
        assert [type(layer) for layer in model.model.layers] == served
        assert served[:-1] == kinds[:-1]
        assert served[-1] is not kinds[-1]
        assert issubclass(served[-1], kinds[-1])
    assert [type(layer) for layer in model.model.layers] == kinds


def test_forwards_that_know_of_no_packed_row_stay_as_they_are():
    model = make_family("qwen2")
    ids = torch.arange(2, 12)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    with reading_completions(model):
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)


def test_prompts_are_prefilled_up_to_what_the_first_token_is_sampled_from():
    model = make_family("qwen2").eval()
    engine = GroupEngine(model, SamplingOptions(max_completion_length=3, pad_token_id=0, eos_token_ids=(1,)))
    request = RolloutRequest(["", ""], [[5, 6, 7, 8], [9, 10]], 2, [0, 1])
    engine.rollout(request)  # compares with plain forwards
    computed = []
    with model.model.layers[-1].mlp.register_forward_pre_hook(lambda module, args: computed.append(args[0].shape[1])):
        engine.rollout(request)
    assert computed[0] == 2
