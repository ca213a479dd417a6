"""Tell by which of its ways Ollama 0.30 and newer renders the prompts of an exported model."""

from __future__ import annotations

from dataclasses import replace

from macft.ollama.template import Proof

# the TEMPLATE; the chat template in the GGUF, by llama.cpp; the TEMPLATE, with answers read as harmony
GO, JINJA, HARMONY = "TEMPLATE", "chat template", "harmony"


def ollama_way(architecture: str, jinja: str, go: str | None) -> str:
    """The way that Ollama takes for a model of these templates, unless OLLAMA_GO_TEMPLATE is set.

    The rules are those of its server (shouldUseHarmony, shouldPreferChatTemplate). Our TEMPLATE names no tools and no
    thoughts, so the chat template is preferred as soon as it knows one of them.
    """
    if go is not None and architecture == "gpt-oss" and "<|start|>" in go and "<|end|>" in go:
        return HARMONY
    return JINJA if go is None or capabilities(jinja) else GO


def capabilities(jinja: str) -> tuple[str, ...]:
    """What Ollama takes a chat template to be able to, by the texts that it looks for."""
    cuts = "content.split('</think>')" in jinja or 'content.split("</think>")' in jinja
    cuts = cuts and "reasoning_content" not in jinja and "<SPECIAL_12>" not in jinja
    has_thinking = cuts or ("<think>" in jinja and "</think>" in jinja)
    has_tools = "tools" in jinja or "tool_call" in jinja
    return (*["tools"] * has_tools, *["thinking"] * has_thinking)


def without_harm(proof: Proof, way: str) -> Proof:
    """The proof, without a TEMPLATE that would take the place of a chat template that is exact."""
    if way == HARMONY:
        reason = "With a TEMPLATE Ollama would read the answers of this model by its own rules for harmony."
        return replace(proof, go=None, reason=reason)
    if way == GO and proof.date is not None:
        return replace(proof, go=None, reason="The template writes today's date, which a Go template cannot.")
    return proof
