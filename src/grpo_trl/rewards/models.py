"""Reward models: loading one with its tokenizer, and judging completions with it."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from .call import RewardBatch, RewardLogs, RewardResult


class ModelReward:
    """A sequence-classification model with one label; its logit is the reward.

    Args:
        model: The reward model.
        tokenizer: Its tokenizer, with a pad token.
        chat_template_kwargs: Passed to the tokenizer's `apply_chat_template` for conversational prompts.
        batch_size: Completions per forward.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template_kwargs: dict[str, Any],
        batch_size: int,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.chat_template_kwargs = chat_template_kwargs
        self.batch_size = batch_size
        self.name = model.config._name_or_path.rstrip("/").split("/")[-1] or type(model).__name__

    @torch.no_grad()
    def __call__(self, batch: RewardBatch) -> RewardResult:
        texts = [self._text(p, c) for p, c in zip(batch.prompts, batch.completions, strict=True)]
        device = next(self.model.parameters()).device
        rewards: list[float] = []
        self.model.eval()
        for start in range(0, len(texts), self.batch_size):
            inputs = self.tokenizer(
                texts[start : start + self.batch_size],
                return_tensors="pt",
                padding=True,
                padding_side="right",
                add_special_tokens=False,
            ).to(device)
            rewards += self.model(**inputs).logits[:, 0].double().tolist()
        return RewardResult.of(rewards, len(texts), RewardLogs(), self.name)

    def _text(self, prompt: Any, completion: Any) -> str:
        if isinstance(prompt, str):
            return prompt + completion
        return str(self.tokenizer.apply_chat_template(prompt + completion, tokenize=False, **self.chat_template_kwargs))


def load_reward_model(path: str, init_kwargs: dict[str, Any]) -> Any:
    """The sequence-classification model with one label that stands at a path or hub name."""
    return AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **init_kwargs)


def reward_tokenizer(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, trust_remote_code: bool
) -> PreTrainedTokenizerBase:
    """The tokenizer of a reward model, loaded from the model's own path if None, and both with a pad token."""
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    # A classification head reads the last token that is not padding, which it finds by this id.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer
