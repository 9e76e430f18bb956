"""How a prompt becomes tokens: one BOS, no EOS at its end, nothing that a text model cannot see."""

from typing import Any

from transformers import PreTrainedTokenizerBase


def tokenize_prompts(
    prompts: list[Any], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any], name: str
) -> list[list[int]]:
    """Tokenize prompts: strings as they are, lists of messages through the chat template.

    A string that begins with the BOS token, as one that a chat template has rendered before, gets no second one, and no
    prompt ends in an EOS token that the tokenizer has appended. Parts of a message's content are joined if all are text;
    keys whose value is None, which Arrow fills in, do not reach the template.

    Args:
        prompts: All strings, or all lists of messages.
        tokenizer: Of the policy.
        chat_template_kwargs: Passed to `apply_chat_template`.
        name: The dataset, for messages.

    Raises:
        ValueError: The prompts are of different kinds; the tokenizer has no chat template, or it refuses the messages; a
            message has no role, or a part that is not text.
    """
    for prompt in prompts:
        if not isinstance(prompt, type(prompts[0])) or not isinstance(prompt, (str, list)):
            raise ValueError(
                f"{name} has the prompt {prompt!r} ({type(prompt).__name__}); all prompts must be strings, or all "
                "lists of messages."
            )
    if isinstance(prompts[0], str):
        return _tokenize_strings(prompts, tokenizer)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{name} has lists of messages as prompts, and the tokenizer has no chat template; pass as processing_class "
            "the tokenizer of an instruct model, set its chat_template, or make the prompts strings."
        )
    return [_tokenize_messages(messages, tokenizer, chat_template_kwargs, name) for messages in prompts]


def _tokenize_strings(prompts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    tokenized: list[list[int]] = tokenizer(prompts)["input_ids"]
    plain: list[list[int]] = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return [
        _without_added(ids, own, tokenizer.bos_token_id, tokenizer.eos_token_id)
        for ids, own in zip(tokenized, plain, strict=True)
    ]


def _without_added(ids: list[int], own: list[int], bos: int | None, eos: int | None) -> list[int]:
    """Remove a BOS that the text has itself, and an EOS that it has not; `own` are the tokens of the text alone."""
    if bos is not None and own[:1] == [bos] and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if ids[-1:] == [eos] and own[-1:] != [eos]:
        ids = ids[:-1]
    return ids


def _tokenize_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: dict[str, Any], name: str
) -> list[int]:
    if not messages:
        return []
    cleaned = [_cleaned(message, name) for message in messages]
    continued = cleaned[-1]["role"] == "assistant"
    try:
        rendered: Any = tokenizer.apply_chat_template(
            cleaned,
            add_generation_prompt=not continued,
            continue_final_message=continued,
            tokenize=True,
            return_dict=True,
            **chat_template_kwargs,
        )
    except Exception as error:  # a template is a program
        raise ValueError(
            f"{name} has the conversation {cleaned!r}, which the chat template does not render ({type(error).__name__}: "
            f"{error})."
        ) from error
    return rendered["input_ids"]


def _cleaned(message: Any, name: str) -> dict[str, Any]:
    """Return a message without keys that are None, its content as one string where it comes in parts."""
    if not isinstance(message, dict):
        raise ValueError(
            f"{name} has a prompt with the message {message!r} ({type(message).__name__}); a message is "
            "{'role': 'user', 'content': ...}, and a prompt that is no conversation is a string."
        )
    message = {key: value for key, value in message.items() if value is not None}
    if "role" not in message:
        raise ValueError(
            f"{name} has the message {message!r} without a 'role'; a message is {{'role': 'user', 'content': ...}}."
        )
    content = message.get("content")
    if content is None and message["role"] in ("system", "user"):
        raise ValueError(f"{name} has the message {message!r} without a 'content'; remove it, or write what it says.")
    if not isinstance(content, list):
        return message
    others = [
        part for part in content if not isinstance(part, dict) or part.get("type") != "text" or "text" not in part
    ]
    if others:
        kind = others[0].get("type") if isinstance(others[0], dict) else others[0]
        raise ValueError(
            f"{name} has a message with a part of type {kind!r}; only text is supported, and images would not be seen. "
            "Remove these parts."
        )
    return message | {"content": "".join(part["text"] for part in content)}
